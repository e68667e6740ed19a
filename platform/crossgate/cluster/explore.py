"""Which trials a search makes: those of a plan, or those that Optuna proposes after what it was told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from crossgate.cluster.population import Population
from crossgate.cluster.space import Point, Proposals, check_space, draws, grid
from crossgate.cluster.trials import (
    Planned,
    TrialRecord,
    known_trials,
    read_record,
    refused,
    reports_of,
    trial_of,
    write_record,
)
from crossgate.config import Recipe
from crossgate.errors import UserError

ENDED = ("finished", "pruned")
_CHECKED = 32


class Exploration(Protocol):
    """Trials that are still to be run, one after another."""

    left: int
    """How many, at most."""

    def draw(self) -> Planned | None:
        """Returns the next trial, or None when there is none.

        Raises:
            NotYet: while it depends on those under way.
        """
        ...

    def tell(self, record: TrialRecord) -> None:
        """Says how a trial ended."""
        ...

    def records(self) -> list[TrialRecord]:
        """Returns every trial of the search as its directory has it."""
        ...


def exploration(recipe: Recipe) -> Exploration:
    """Returns the trials of a search.

    Raises:
        UserError: for a space with a key or value that a recipe cannot have.
    """
    check_space(recipe.search)
    if recipe.search.scheduler == "pbt":
        return Population(recipe)
    return Proposed(recipe) if recipe.search.searcher == "optuna" else Drawn(plan(recipe))


def plan(recipe: Recipe) -> list[Planned]:
    """Returns the trials that are known beforehand: the whole grid, or `samples` distinct draws from the space.

    Raises:
        UserError: as `exploration`.
    """
    check_space(recipe.search)
    points = draws(recipe.search, recipe.run.seed) if recipe.search.samples else grid(recipe.search)
    return [trial_of(recipe, point) for point in points]


class Drawn:
    """Trials of a plan, in its order, without those that have ended."""

    def __init__(self, trials: list[Planned]) -> None:
        self._trials = trials
        waiting = [one for one in trials if read_record(one[0]).status not in ENDED]
        self.left, self._waiting = len(waiting), iter(waiting)

    def draw(self) -> Planned | None:
        return next(self._waiting, None)

    def tell(self, record: TrialRecord) -> None:
        """A plan does not learn."""

    def records(self) -> list[TrialRecord]:
        return [read_record(record) for record, _ in self._trials]


class Proposed:
    """Trials as Optuna proposes them; first those of an earlier start that did not end."""

    def __init__(self, recipe: Recipe) -> None:
        for point in draws(recipe.search.model_copy(update={"samples": _CHECKED}), recipe.run.seed):
            trial_of(recipe, point)  # a misspelt key is found before anything starts
        self._recipe, self._folder = recipe, Path(recipe.run.output) / recipe.run.name
        self._proposals = Proposals(recipe.search, recipe.run.seed)
        self._again: list[Point] = []
        self.left = recipe.search.samples
        for record in self.records():
            if record.status in ENDED:
                self._proposals.tell(record.overrides, reports_of(record.directory), record.value, record.status)
                self.left -= 1
            else:
                self._again.append(record.overrides)
        self.left = max(self.left, 0)

    def draw(self) -> Planned | None:
        """Writes the record at once: a search that is killed must know later what was under way."""
        while True:
            if self._again:
                point = self._again.pop(0)
                self._proposals.expect(point)
            else:
                proposed = self._proposals.ask()
                if proposed is None:
                    return None
                point = proposed
            try:
                record, settings = trial_of(self._recipe, point)
            except UserError as error:  # keys that do not go together: a result as well
                record = refused(self._recipe, point, error)
                write_record(record)
                self._proposals.tell(point, [], None, "failed")
                continue
            write_record(record)
            return record, settings

    def tell(self, record: TrialRecord) -> None:
        self._proposals.tell(record.overrides, reports_of(record.directory), record.value, record.status)

    def records(self) -> list[TrialRecord]:
        found = []
        for record in known_trials(self._folder):
            if not record.added and (record.name.endswith("-refused") or self._is_mine(record)):
                found.append(replace(record, directory=str(self._folder / record.name)))
        return found

    def _is_mine(self, record: TrialRecord) -> bool:
        """Whether it is a trial of this space, these settings and this index."""
        try:
            return trial_of(self._recipe, record.overrides)[0].name == record.name
        except UserError:
            return False


def listed(trials: list[Planned]) -> Callable[[], Planned | None]:
    """Returns a function that hands out the trials one by one."""
    left = iter(trials)
    return lambda: next(left, None)
