"""The trials of a population, in rounds: each is trained to the same step, then the worst go on from the best.

What was decided is in a journal in the search's folder, a line a round, written before anything is done about it: a
search that is killed anywhere finds there who goes on from whom, and does what is not done yet. A trial's folder is at
any time what a run by its recipe, schedule included, would have left there, so that the recipe replays it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossgate.cluster.exchange import continued, explored, settings_of, takeovers
from crossgate.cluster.space import draws, values_of
from crossgate.cluster.trials import NotYet, Planned, TrialRecord, identity, read_record, trial_of, write_record
from crossgate.config import Range, Recipe
from crossgate.errors import UserError, writing
from crossgate.recipe import with_overrides
from crossgate.training.checkpoint import newest_whole, store_recipe
from crossgate.training.durable import write_atomically

_MAKES_IT = {"space", "samples", "metric", "interval", "exploit", "resample"}
_DONE = ("paused", "finished")


@dataclass(frozen=True)
class Round:
    """What was decided when every trial had come to a step."""

    step: int
    """0: the beginning, where every trial gets its first settings."""
    values: dict[str, float | None]
    """Trial -> its value at that step (None: it failed)."""
    donors: dict[str, str]
    """Trial that takes over -> trial that it goes on from."""
    settings: dict[str, dict[str, Any]]
    """Trial that begins or takes over -> its settings from then on."""


class Population:
    """Trials that are compared every `search.interval` steps, all of them at the same step.

    Args:
        recipe: of the search.

    Raises:
        UserError: for a space with a value that a recipe cannot have, or with fewer points than trials.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._folder = recipe, Path(recipe.run.output) / recipe.run.name
        digest = _identity(recipe)
        self._journal = self._folder / f"population-{digest}.jsonl"
        steps, interval = recipe.training.steps, recipe.exchange_interval
        self._ends = [*range(interval, steps, interval), steps]
        self._rounds = _read(self._journal)
        if not self._rounds:
            self._rounds = [_begin(recipe, digest)]
        self._trials = _fold(self._rounds)
        self._plans: dict[str, Planned] = {}
        for key, dimension in recipe.search.space.items():
            bounds = [dimension.low, dimension.high] if isinstance(dimension, Range) else values_of(dimension)
            for value in bounds:  # whatever may be drawn later
                with_overrides(recipe, {"kind": "finetune", key: value})
        self._under_way: set[str] = set()
        self._begun = False
        self._waiting = self._undone()
        self.left = len(self._waiting) + len(self._trials) * (len(self._ends) - len(self._rounds))

    @property
    def _until(self) -> int:
        return self._ends[len(self._rounds) - 1]

    def draw(self) -> Planned | None:
        """Returns the next stretch of a trial.

        Raises:
            NotYet: while others of the same round are trained.
        """
        if not self._begun:
            self._begun = True
            self._settle()
        if not self._waiting:
            if self._under_way:
                raise NotYet
            if self._until == self._ends[-1] or not self._decide():
                return None
            self._waiting = self._undone()
        name = self._waiting.pop(0)
        record, settings = self._planned(name)
        record = replace(record, until=self._until, seconds=read_record(record).seconds)
        write_record(record)
        self._under_way.add(name)
        return record, settings

    def tell(self, record: TrialRecord) -> None:
        self._under_way.discard(record.name)
        if read_record(record).status == "waiting":
            write_record(record, status="failed", reason="its process died")

    def records(self) -> list[TrialRecord]:
        """Returns the trials as their directories have them, wherever those have been moved to."""
        planned = [self._planned(name)[0] for name in self._trials]
        return [replace(read_record(record), directory=record.directory) for record in planned]

    # ---- rounds ------------------------------------------------------------------------------------------------

    def _planned(self, name: str) -> Planned:
        """Returns a trial as it is in this round; its recipe is parsed once a round, however often it is looked at."""
        if name not in self._plans:
            self._plans[name] = trial_of(self._recipe, self._trials[name], name=name)
        return self._plans[name]

    def _undone(self) -> list[str]:
        """Returns the trials that have not come to the round's end yet."""
        found = self.records()
        return [one.name for one in found if one.until != self._until or one.status not in _DONE]

    def _decide(self) -> bool:
        """Compares the trials and writes down who goes on from whom; False where all of them failed."""
        search, step = self._recipe.search, self._until
        values = {record.name: _value(record) for record in self.records()}
        if all(value is None for value in values.values()):
            return False
        source = random.Random(f"{self._recipe.run.seed} {step}")
        donors = takeovers(values, search.exploit, source)
        settings = {
            taker: explored(settings_of(self._trials[giver]), search.space, search.resample, source)
            for taker, giver in donors.items()
        }
        self._rounds.append(Round(step, values, donors, settings))
        self._trials = _fold(self._rounds)
        self._plans.clear()
        self._settle()
        return True

    def _settle(self) -> None:
        """Writes the journal and has done what it says, before any donor goes on from where others take over."""
        self._write()
        for name in self._rounds[-1].donors:
            self._adopt(name)

    def _write(self) -> None:
        with writing("the population's journal", self._journal):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._journal, "".join(json.dumps(vars(one)) + "\n" for one in self._rounds))

    # ---- taking over -------------------------------------------------------------------------------------------

    def _adopt(self, name: str) -> None:
        """Makes a trial's folder that of its donor at the last round, with its new recipe, unless that is done.

        What marks it done is written last; the donor stands still until then, so that it can be done again.
        """
        last = self._rounds[-1]
        record, settings = self._planned(name)
        if name not in last.donors or read_record(record).overrides == record.overrides:
            return
        donor, folder = self._folder / last.donors[name], Path(record.directory)
        checkpoint, _ = newest_whole(donor)
        if checkpoint is None or checkpoint.step != last.step:
            raise UserError(
                f"its checkpoint of step {last.step} is gone, which {name} goes on from",
                where=donor,
                cure="search under another run.name",
            )
        best = checkpoint.path.with_name(f"step-{checkpoint.manifest.best_step:08d}")
        with writing("what a trial takes over", folder):
            fresh = folder / ".taken-over"
            shutil.rmtree(fresh, ignore_errors=True)
            for path in {checkpoint.path, best}:
                if path.exists():
                    shutil.copytree(path, fresh / path.name)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            fresh.rename(folder / "checkpoints")
            shutil.copyfile(donor / "metrics.jsonl", folder / ".metrics.jsonl.partial")
            (folder / ".metrics.jsonl.partial").replace(folder / "metrics.jsonl")
        store_recipe(folder, settings)
        write_record(record, value=last.values[donor.name], step=last.step, seconds=read_record(record).seconds)


def _identity(recipe: Recipe) -> str:
    """Returns a digest of all that makes a population: other trials, rounds or settings are another one."""
    asked = recipe.search.model_dump_json(include=_MAKES_IT)
    return hashlib.sha256(f"{identity(recipe, recipe.run.seed)} {asked}".encode()).hexdigest()[:6]


def _begin(recipe: Recipe, digest: str) -> Round:
    points = draws(recipe.search, recipe.run.seed)
    if len(points) < recipe.search.samples:
        raise UserError(
            f"the space has {len(points)} points, fewer than the {recipe.search.samples} trials of search.samples",
            where="search.space",
            expected="a range, or lists with more values",
        )
    names = [f"member{place:02d}-{digest}" for place in range(len(points))]
    return Round(0, dict.fromkeys(names), {}, dict(zip(names, points, strict=True)))


def _fold(rounds: list[Round]) -> dict[str, dict[str, Any]]:
    """Returns trial -> its overrides, schedule included, after all rounds."""
    trials: dict[str, dict[str, Any]] = {name: dict(one) for name, one in rounds[0].settings.items()}
    for one in rounds[1:]:
        before = dict(trials)
        for taker, giver in one.donors.items():
            trials[taker] = continued(before[giver], one.step, one.settings[taker])
    return trials


def _read(journal: Path) -> list[Round]:
    return [Round(**json.loads(line)) for line in journal.read_text().splitlines()] if journal.exists() else []


def _value(record: TrialRecord) -> float | None:
    there = record.status in _DONE and record.value is not None and math.isfinite(record.value)
    return record.value if there else None
