"""What became of the trials of a search, on disk beside them, and the leaderboard that they make."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.recipe import recipe_digest, with_overrides
from crossgate.runs.context import open_index
from crossgate.tracking import pinned
from crossgate.training.durable import write_atomically

RECORD, REPORTS = "trial.json", "reports.jsonl"
SCHEDULE = "training.schedule"
_ORDER = {"finished": 0, "explored": 1, "paused": 2, "pruned": 3, "failed": 4}


@dataclass(frozen=True)
class TrialRecord:
    """What became of one trial."""

    name: str
    overrides: dict[str, Any]
    directory: str
    status: str = "waiting"
    """finished, pruned (stopped early, since others were better at that step), paused (until its population is compared
    again), failed, or waiting; on the leaderboard also explored (finished, but by `search.explore`)."""
    value: float | None = None
    """The search's metric on validation: of the weights that were kept, or when it was pruned."""
    step: int = 0
    """Step that the value belongs to."""
    reason: str = ""
    """Why it failed; on the leaderboard also, of a finalist, which of its seeds were lost."""
    seconds: float = 0.0
    """That it was trained for; of a population in all its stretches."""
    repeats: str = ""
    """Name of the trial that this one repeats with another seed."""
    added: bool = False
    """To compare the best with: the search did not draw it, and a later start does not count it as drawn."""
    by_seed: list[float] = field(default_factory=list)
    """On the leaderboard, of a finalist: values of the seeds that count, whose mean is `value`."""
    until: int = 0
    """Step at which it pauses (0: it is trained to its end)."""

    def seed(self, recipe: Recipe) -> int:
        """Returns its seed in a search: the search's own, except for one that repeats another."""
        return int(self.name.removeprefix(f"{self.repeats}-seed")) if self.repeats else recipe.run.seed

    @property
    def command(self) -> str:
        """What trains this very trial once more, without touching the test split; empty where nothing ever began."""
        recipe = Path(self.directory) / "recipe.yaml"
        if not recipe.exists():
            return ""
        return f"crossgate finetune --config {shlex.quote(str(recipe))} run.name={self.name}-again 'data.test=[]'"

    @property
    def settings(self) -> str:
        """The overrides on one line."""
        words = [f"{key}={value}" for key, value in self.overrides.items() if key != SCHEDULE]
        return ", ".join(words + ([f"then {self.schedule}"] if self.schedule else []))

    @property
    def schedule(self) -> str:
        """What it changed while training, in words: ``after 40 optim.lr=0.01; after 80 optim.lr=0.008``."""
        words = (", ".join(f"{key}={value}" for key, value in change["settings"].items()) for change in self.changes)
        return "; ".join(f"after {change['after']} {said}" for change, said in zip(self.changes, words, strict=True))

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Its schedule: after which step which settings."""
        return self.overrides.get(SCHEDULE, [])


@dataclass
class SearchResult:
    """The leaderboard of a search."""

    metric: str
    trials: list[TrialRecord] = field(default_factory=list)
    """Best first: those of several seeds, other finished ones, explored ones, paused ones, pruned ones, failed ones."""
    verdict: str = ""
    """Whether a gate beat uniform averaging, in a sentence."""
    seeds: list[int] = field(default_factory=list)
    """That the finalists' means are over."""

    @property
    def winner(self) -> TrialRecord | None:
        """The best of those that were trained in full; None where none was."""
        return self.trials[0] if self.trials and self.trials[0].status == "finished" else None

    def best(self) -> dict[str, Any]:
        """Returns the overrides of the best trial.

        Raises:
            UserError: when no trial finished.
        """
        if self.winner is None:
            reasons = {trial.reason for trial in self.trials if trial.reason} or {"there were none"}
            raise UserError("no trial finished", where="search", cure="; ".join(sorted(reasons)))
        return dict(self.winner.overrides)

    def directories(self, key: str) -> dict[str, Path]:
        """Returns value of the key -> run directory of the best finished trial with that value."""
        found: dict[str, Path] = {}
        for trial in self.trials:
            if trial.status == "finished" and key in trial.overrides:
                found.setdefault(str(trial.overrides[key]), Path(trial.directory))
        return found

    def table(self) -> str:
        """Returns the leaderboard as text, the verdict below it."""
        rows = [("rank", self.metric, "time", "trial")]
        for place, trial in enumerate(self.trials, start=1):
            rows.append((str(place), _shown(trial), f"{trial.seconds:.0f} s", trial.settings + _note(trial)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        ]
        return "\n".join([*lines, *([self.verdict] if self.verdict else [])])

    def columns(self) -> dict[str, list[Any]]:
        """Returns the leaderboard as named columns: what was varied, how it ended, how to repeat it."""
        keys = list(dict.fromkeys(key for trial in self.trials for key in trial.overrides if key != SCHEDULE))
        table: dict[str, list[Any]] = {"rank": list(range(1, len(self.trials) + 1))}
        table |= {key: [_plain(trial.overrides.get(key)) for trial in self.trials] for key in keys}
        if any(SCHEDULE in trial.overrides for trial in self.trials):
            table["schedule"] = [trial.schedule for trial in self.trials]
        table[self.metric] = [trial.value for trial in self.trials]
        for name in ("status", "step", "seconds", "name", "reason", "command"):
            table[name] = [getattr(trial, name) for trial in self.trials]
        table["seeds"] = [max(1, len(trial.by_seed)) for trial in self.trials]
        return table


Planned = tuple[TrialRecord, Recipe]


class NotYet(Exception):
    """There will be a next trial, but not before one that is under way has ended."""


def _shown(trial: TrialRecord) -> str:
    return f"{trial.value:.4f}" if trial.value is not None else trial.status


def _note(trial: TrialRecord) -> str:
    notes = [trial.reason] if trial.reason else []
    if trial.status in ("explored", "pruned", "paused"):
        notes.append(f"{trial.status} at step {trial.step}")
    if trial.status == "finished" and any(change["after"] >= trial.step for change in trial.changes):
        notes.append(f"its weights are of step {trial.step}, before the last change")
    if len(trial.by_seed) > 1:
        notes.append(f"{len(trial.by_seed)} seeds, {min(trial.by_seed):.4f} to {max(trial.by_seed):.4f}")
    return f"  ({'; '.join(notes)})" if notes else ""


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def trial_of(
    recipe: Recipe,
    overrides: Mapping[str, Any],
    seed: int = 0,
    name: str = "",
    digests: dict[str, str] | None = None,
) -> tuple[TrialRecord, Recipe]:
    """Returns a point's trial and its recipe. Keys and values that a recipe cannot have are found here.

    A trial's directory is named by its settings and its index, so that clips packed anew give new trials, and a
    search that is given more samples keeps those that it has.

    Args:
        recipe: of the search.
        overrides: recipe key -> value.
        seed: 0 for the search's own seed, n for the n-th after it.
        name: of the trial with the search's own seed, instead of one by its settings.
        digests: index -> its digest, looked up here and added to, so that many trials open an index once.

    Raises:
        UserError: as `parse_recipe`.
        Unreachable: the index cannot be read now, which says nothing of the point.
    """
    settings = with_overrides(recipe, {"kind": "finetune", **overrides, "run.seed": recipe.run.seed + seed})
    own = name or f"{_slug(overrides)}-{identity(settings, recipe.run.seed, digests)[:6]}"
    name = f"{own}-seed{settings.run.seed}" if seed else own
    settings.tracking = pinned(recipe.tracking, recipe.run.output)  # trials lie deeper than the search itself
    settings.run.name, settings.run.output = name, str(Path(recipe.run.output) / recipe.run.name)
    directory = str(Path(settings.run.output) / name)
    return TrialRecord(name, dict(overrides), directory, repeats=own if seed else ""), settings


def refused(recipe: Recipe, overrides: Mapping[str, Any], error: UserError) -> TrialRecord:
    """Returns the record of a point that makes no valid recipe."""
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()  # a slug is cut short
    name = f"{_slug(overrides)}-{digest[:6]}-refused"
    directory = str(Path(recipe.run.output) / recipe.run.name / name)
    return TrialRecord(name, dict(overrides), directory, status="failed", reason=str(error).splitlines()[0])


def identity(settings: Recipe, seed: int, digests: dict[str, str] | None = None) -> str:
    """Returns a digest of all that makes a trial's numbers: its settings, the seed, the content of its index."""
    digests = {} if digests is None else digests
    if settings.data.index and settings.data.index not in digests:
        digests[settings.data.index] = open_index(settings).digest
    index = digests.get(settings.data.index, "")
    bare = settings.model_copy(update={"search": type(settings.search)(metric=settings.search.metric)})
    return hashlib.sha256(f"{recipe_digest(bare)} {seed} {index}".encode()).hexdigest()


def _slug(overrides: Mapping[str, Any]) -> str:
    parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in overrides.items())
    return re.sub(r"[^A-Za-z0-9.-]+", "-", "_".join(parts))[:60].strip("-")


def leaderboard(recipe: Recipe, records: Sequence[TrialRecord]) -> SearchResult:
    """Returns the records, best first; a trial and its repetitions with other seeds are one row, valued by their mean.

    Those that were run with several seeds stand first: one lucky seed must not beat the mean of three. All their means
    are over the same seeds, see `counted`. Of equal ones that with fewer changes stands first: a trial that took over
    and found nothing better has its donor's weights.
    """
    runs = {record.name: _by_seed(recipe, record, records) for record in records if not record.repeats}
    values = {
        name: {seed: one.value for seed, one in own.items() if one.value is not None} for name, own in runs.items()
    }
    complete, seeds = counted(values, recipe.run.seed)
    rows = []
    for record in (record for record in records if not record.repeats):
        lost = [
            f"seed {one.seed(recipe)} failed: {one.reason}"
            for one in records
            if one.repeats == record.name and one.reason
        ]
        if record.name in complete:
            own = [values[record.name][seed] for seed in seeds]
            record = replace(record, value=sum(own) / len(own), by_seed=own, reason="; ".join(lost))
        elif lost and record.status == "finished":
            record = replace(record, reason=f"not ranked among the finalists, {'; '.join(lost)}")
        rows.append(record)

    def place(record: TrialRecord) -> tuple[int, bool, int, float, int]:
        pruned_at = -record.step if record.status == "pruned" else 0
        value = record.value or 0.0
        return _ORDER.get(record.status, len(_ORDER)), not record.by_seed, pruned_at, -value, len(record.changes)

    return SearchResult(recipe.search.metric, sorted(rows, key=place), seeds=seeds)


def counted(values: Mapping[str, Collection[int]], chose: int) -> tuple[list[str], list[int]]:
    """Returns which finalists are ranked, and the seeds that their means are over.

    Only seeds that all of them have: else a seed that one of them lost would turn the order. One that has too few is
    not ranked, so that the others keep theirs. The seed by which the finalists were chosen flatters them, and does not
    count where two others are left.

    Args:
        values: trial -> seeds with which it finished.
        chose: the search's own seed.
    """
    ranked = sorted((name for name in values if len(values[name]) > 1), key=lambda name: (-len(values[name]), name))
    while ranked:
        common = set(values[ranked[0]]).intersection(*(values[name] for name in ranked))
        if len(common) > 1:
            fresh = common - {chose}
            return ranked, sorted(fresh if len(fresh) > 1 else common)
        ranked.pop()
    return [], []


def _by_seed(recipe: Recipe, record: TrialRecord, records: Sequence[TrialRecord]) -> dict[int, TrialRecord]:
    """Returns a trial that finished and its finished repetitions."""
    if record.status != "finished":
        return {}
    own = [record, *(one for one in records if one.repeats == record.name and one.status == "finished")]
    return {one.seed(recipe): one for one in own}


# ---- on disk ---------------------------------------------------------------------------------------------------


def read_record(record: TrialRecord) -> TrialRecord:
    """Returns what the trial's directory says became of it; the record as it is when it says nothing."""
    path = Path(record.directory) / RECORD
    return TrialRecord(**json.loads(path.read_text())) if path.exists() else record


def write_record(record: TrialRecord, **outcome: Any) -> None:
    """Writes down what became of a trial, beside and renamed."""
    folder = Path(record.directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(asdict(record) | outcome))


def known_trials(run_dir: Path) -> list[TrialRecord]:
    """Returns the trials that any start of a search began, in the order of their names; repetitions are left out."""
    found = [TrialRecord(**json.loads(path.read_text())) for path in sorted(run_dir.glob(f"*/{RECORD}"))]
    return [record for record in found if not record.repeats]


def note_report(directory: str | Path, step: int, value: float) -> None:
    """Keeps a value that a trial had on its way."""
    with (Path(directory) / REPORTS).open("a") as file:
        file.write(json.dumps([step, value]) + "\n")


def reports_of(directory: str | Path) -> list[tuple[int, float]]:
    """Returns steps and values on the way, each step once, in order; a line that a kill cut short is left out."""
    path = Path(directory) / REPORTS
    found: dict[int, float] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            step, value = json.loads(line)
        except ValueError:
            continue
        found[int(step)] = float(value)
    return sorted(found.items())
