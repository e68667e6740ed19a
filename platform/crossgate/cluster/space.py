"""Points of a search space: the whole grid, random draws, or Optuna's proposals; and which keys a point has."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from crossgate.config import Choice, Range, SearchConfig
from crossgate.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

Point = dict[str, Any]
Dimension = list | Choice | Range

_DRAWS = 200  # in vain, before a space counts as used up


def check_space(config: SearchConfig) -> None:
    """Refuses a space without points.

    Raises:
        UserError: naming the key.
    """
    if not config.space or any(isinstance(one, list) and not one for one in config.space.values()):
        raise UserError("nothing to try", where="search.space", expected="a recipe key with a list of values")


def values_of(dimension: Dimension) -> list:
    """Returns the values of a list or choice; none of a range."""
    if isinstance(dimension, Range):
        return []
    return dimension.values if isinstance(dimension, Choice) else dimension


def varied(point: Mapping[str, Any], dimension: Dimension) -> bool:
    """Whether a key's conditions hold in a point that has all earlier keys."""
    return isinstance(dimension, list) or all(point.get(key) in values for key, values in dimension.when.items())


def within(space: Mapping[str, Dimension], point: Mapping[str, Any]) -> bool:
    """Whether a point is one of the space: with just the keys that its conditions let vary, each with a value of it."""
    keys = {key for key, dimension in space.items() if varied(point, dimension)}
    return point.keys() == keys and all(_has(space[key], value) for key, value in point.items())


def _has(dimension: Dimension, value: Any) -> bool:
    if not isinstance(dimension, Range):
        return value in values_of(dimension)
    return dimension.low <= value <= dimension.high and not (dimension.integer and value % 1)


def grid(config: SearchConfig) -> Iterator[Point]:
    """Yields every point of a space of lists, the last key changing fastest."""

    def extend(point: Point, left: list[tuple[str, Dimension]]) -> Iterator[Point]:
        if not left:
            yield point
            return
        (key, dimension), *rest = left
        if not varied(point, dimension):
            yield from extend(point, rest)
            return
        for value in values_of(dimension):
            yield from extend({**point, key: value}, rest)

    yield from extend({}, list(config.space.items()))


def draws(config: SearchConfig, seed: int) -> list[Point]:
    """Returns `samples` distinct random points; fewer, where the space has no more."""
    source = random.Random(seed)
    if not any(isinstance(dimension, Range) for dimension in config.space.values()):
        points = list(grid(config))
        return source.sample(points, min(config.samples, len(points)))
    found: list[Point] = []
    for _ in range(config.samples + _DRAWS):
        point: Point = {}
        for key, dimension in config.space.items():
            if varied(point, dimension):
                point[key] = drawn(dimension, source)
        if point not in found:
            found.append(point)
        if len(found) == config.samples:
            break
    return found


def drawn(dimension: Dimension, source: random.Random) -> Any:
    if not isinstance(dimension, Range):
        return source.choice(values_of(dimension))
    low, high = (dimension.low, dimension.high) if not dimension.log else map(math.log, (dimension.low, dimension.high))
    value = source.uniform(low, high)
    return rounded(math.exp(value) if dimension.log else value, dimension)


def rounded(value: float, dimension: Range) -> float | int:
    """Four digits are enough for a hyperparameter, and can be read."""
    value = min(max(float(f"{value:.4g}"), dimension.low), dimension.high)
    return round(value) if dimension.integer else value


class Proposals:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) over a space with conditions.

    It is asked and told, so that a search that was killed can tell it all that it knew.

    Args:
        config: space and number of trials.
        seed: of the sampler.
    """

    def __init__(self, config: SearchConfig, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = config.space
        startup = min(10, max(4, config.samples // 3))
        # Others that run at the same time count as bad ones, so that no two trials try the same.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: list[tuple[Point, Trial]] = []
        self._known: list[Point] = []
        self._first = next(((key, values_of(one)) for key, one in self._space.items() if values_of(one)), ("", []))

    def ask(self) -> Point | None:
        """Returns a point that was never asked or told; None where there seems to be none."""
        for _ in range(_DRAWS):
            untried = [v for v in self._first[1] if all(point.get(self._first[0]) != v for point in self._known)]
            if untried:
                self._study.enqueue_trial({self._first[0]: self._first[1].index(untried[0])})
            trial = self._study.ask()
            point = {key: value for key, value in self._suggest(trial)}
            if point not in self._known:
                self._known.append(point)
                self._asked.append((point, trial))
                return point
            self._study.tell(trial, state=_state("FAIL"))
        return None

    def tell(self, point: Point, reports: list[tuple[int, float]], value: float | None, ended: str) -> None:
        """Says how a point did, whether it was asked for here or in an earlier start.

        Args:
            point: of the space.
            reports: steps and values on the way.
            value: at the end; None where there is none.
            ended: finished, pruned or failed.
        """
        import optuna

        state = _state({"finished": "COMPLETE", "pruned": "PRUNED"}.get(ended, "FAIL"))
        mine = next((trial for asked, trial in self._asked if asked == point), None)
        if mine is None:
            self._known.append(point)
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    params={key: self._code(key, value) for key, value in point.items()},
                    distributions=self._distributions(point),
                    value=value if ended == "finished" else None,
                    intermediate_values=dict(reports),
                )
            )
            return
        self._asked = [(asked, trial) for asked, trial in self._asked if trial is not mine]
        if ended == "pruned":  # Optuna takes the last of these for its value
            for step, seen in reports:
                mine.report(seen, step)
        self._study.tell(mine, value if ended == "finished" else None, state=state)

    def expect(self, point: Point) -> None:
        """Says that a point of the space, of an earlier start, is about to be run again."""
        self._study.enqueue_trial({key: self._code(key, value) for key, value in point.items()})
        trial = self._study.ask(self._distributions(point))
        self._known.append(point)
        self._asked.append((point, trial))

    def _suggest(self, trial: Trial) -> Iterator[tuple[str, Any]]:
        point: Point = {}
        for key, dimension in self._space.items():
            if not varied(point, dimension):
                continue
            if isinstance(dimension, Range) and dimension.integer:
                point[key] = trial.suggest_int(key, int(dimension.low), int(dimension.high), log=dimension.log)
            elif isinstance(dimension, Range):
                number = trial.suggest_float(key, dimension.low, dimension.high, log=dimension.log)
                point[key] = rounded(number, dimension)
            else:  # by place: a value may be a list, which Optuna refuses
                values = values_of(dimension)
                point[key] = values[trial.suggest_categorical(key, list(range(len(values))))]
            yield key, point[key]

    def _distributions(self, point: Point) -> dict[str, BaseDistribution]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {}
        for key in point:
            dimension = self._space[key]
            if not isinstance(dimension, Range):
                found[key] = CategoricalDistribution(list(range(len(values_of(dimension)))))
            elif dimension.integer:
                found[key] = IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
            else:
                found[key] = FloatDistribution(dimension.low, dimension.high, log=dimension.log)
        return found

    def _code(self, key: str, value: Any) -> Any:
        dimension = self._space[key]
        return value if isinstance(dimension, Range) else values_of(dimension).index(value)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
