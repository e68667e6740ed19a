"""Which trials a search makes: those of a plan, or those that Optuna proposes after what it was told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from crossgate.cluster.population import Population
from crossgate.cluster.space import Point, Proposals, check_space, draws, grid, within
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
from crossgate.errors import Unreachable, UserError
from crossgate.recipe import with_overrides

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
    """Returns the trials of a search, as `search.explore` has them.

    Raises:
        UserError: for a space of which a recipe can have no point, or with a key that it cannot have.
    """
    check_space(recipe.search)
    recipe = with_overrides(recipe, recipe.search.explore)
    if recipe.search.scheduler == "pbt":
        return Population(recipe)
    return Proposed(recipe) if recipe.search.searcher == "optuna" else Drawn(*plan(recipe))


def plan(recipe: Recipe) -> tuple[list[Planned], list[TrialRecord]]:
    """Returns the trials that are known beforehand: the whole grid, or `samples` distinct draws from the space.

    Keys that do not go together are a trial as well, one that has failed: it is in the second list.

    Raises:
        UserError: as `exploration`.
    """
    check_space(recipe.search)
    points = draws(recipe.search, recipe.run.seed) if recipe.search.samples else grid(recipe.search)
    return _possible(recipe, points, {})


def _possible(
    recipe: Recipe, points: Iterable[Point], digests: dict[str, str]
) -> tuple[list[Planned], list[TrialRecord]]:
    """Returns the trials of the points that make a recipe, and the records of the others.

    A misspelt key is found before anything starts: it is in none that does.

    Raises:
        UserError: where none does, or none with a certain key.
    """
    trials: list[Planned] = []
    others: list[tuple[Point, UserError]] = []
    for point in points:
        try:
            trials.append(trial_of(recipe, point, digests=digests))
        except Unreachable:
            raise
        except UserError as error:
            others.append((point, error))
    possible = {key for record, _ in trials for key in record.overrides}
    for point, reason in others:
        if not possible.issuperset(point):
            raise reason
    return trials, [refused(recipe, point, reason) for point, reason in others]


class Drawn:
    """Trials of a plan, in its order, without those that have ended.

    Args:
        trials: possible ones.
        impossible: records of the others.
    """

    def __init__(self, trials: list[Planned], impossible: Sequence[TrialRecord] = ()) -> None:
        self._trials, self._impossible, self._unwritten = trials, impossible, list(impossible)
        waiting = [one for one in trials if read_record(one[0]).status not in ENDED]
        self.left, self._waiting = len(waiting), iter(waiting)

    def draw(self) -> Planned | None:
        while self._unwritten:
            write_record(self._unwritten.pop())
        return next(self._waiting, None)

    def tell(self, record: TrialRecord) -> None:
        """A plan does not learn."""

    def records(self) -> list[TrialRecord]:
        return [*(read_record(record) for record, _ in self._trials), *self._impossible]


class Proposed:
    """Trials as Optuna proposes them; first those of an earlier start that did not end."""

    def __init__(self, recipe: Recipe) -> None:
        self._digests: dict[str, str] = {}
        _possible(recipe, draws(recipe.search.model_copy(update={"samples": _CHECKED}), recipe.run.seed), self._digests)
        self._recipe, self._folder = recipe, Path(recipe.run.output) / recipe.run.name
        self._proposals = Proposals(recipe.search, recipe.run.seed)
        self._mine: dict[str, bool] = {}
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
                record, settings = trial_of(self._recipe, point, digests=self._digests)
            except Unreachable:
                raise
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
            if not record.added and self._is_mine(record):
                found.append(replace(record, directory=str(self._folder / record.name)))
        return found

    def _is_mine(self, record: TrialRecord) -> bool:
        """Whether it is a trial of this space, these settings and this index; a name says all of it, and is read once.

        Raises:
            Unreachable: the index cannot be read now; to go on would lose or double trials.
        """
        if record.name not in self._mine:
            self._mine[record.name] = within(self._recipe.search.space, record.overrides) and self._is_named(record)
        return self._mine[record.name]

    def _is_named(self, record: TrialRecord) -> bool:
        try:
            name = trial_of(self._recipe, record.overrides, digests=self._digests)[0].name
        except Unreachable:
            raise
        except UserError as error:
            name = refused(self._recipe, record.overrides, error).name
        return name == record.name


class Finals:
    """Trials of a list to their end, without those that have finished.

    Args:
        trials: the list.
        explored: returns the trials that the search had before.
    """

    def __init__(self, trials: Sequence[Planned], explored: Callable[[], list[TrialRecord]]) -> None:
        self._trials, self._explored = trials, explored
        waiting = [one for one in trials if read_record(one[0]).status != "finished"]
        self.left, self._waiting = len(waiting), iter(waiting)

    def draw(self) -> Planned | None:
        return next(self._waiting, None)

    def tell(self, record: TrialRecord) -> None:
        """A list does not learn."""

    def records(self) -> list[TrialRecord]:
        """Returns each once: a finalist may be one that was explored."""
        every = [*self._explored(), *(read_record(record) for record, _ in self._trials)]
        return list({record.name: record for record in every}.values())
