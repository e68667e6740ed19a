"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846): who goes on from whose weights, and with what.

Plain functions of what was measured and of a source of chance, so that a search that is started again decides alike.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from crossgate.cluster.space import Dimension, Point, drawn, rounded, values_of
from crossgate.cluster.trials import SCHEDULE
from crossgate.config import Range

FACTORS = (0.8, 1.2)
_DRAWS = 20


def takeovers(values: Mapping[str, float | None], share: float, source: random.Random) -> dict[str, str]:
    """Returns trial -> trial whose weights it takes: the worst share draws from the best (truncation selection).

    A trial without a value takes over in any case; one that is as good as what it drew goes on by itself.

    Args:
        values: of each trial at the same step, larger is better; None where it failed.
        share: of all trials, that give and that take at most; one at least.
        source: of chance.
    """
    known = {name: value for name, value in values.items() if value is not None}
    ranked = sorted(known, key=lambda name: (-known[name], name))
    if not ranked:
        return {}
    many = max(1, int(share * len(values)))
    best = ranked[:many]
    failed = sorted(values.keys() - known.keys())
    worst = ranked[max(many, len(values) - many) :]
    found = {name: source.choice(best) for name in worst + failed}
    return {taker: giver for taker, giver in found.items() if taker in failed or known[giver] > known[taker]}


def explored(settings: Point, space: Mapping[str, Dimension], resample: float, source: random.Random) -> Point:
    """Returns other settings near those given, within the space; the same ones where it seems to have no others.

    Args:
        settings: a value for each key of the space.
        space: of the search.
        resample: probability that a key is drawn anew.
        source: of chance.
    """
    found = dict(settings)
    for _ in range(_DRAWS):
        found = {key: _changed(settings[key], dimension, resample, source) for key, dimension in space.items()}
        if found != settings:
            break
    return found


def _changed(value: Any, dimension: Dimension, resample: float, source: random.Random) -> Any:
    if source.random() < resample:
        return drawn(dimension, source)
    if isinstance(dimension, Range):
        return rounded(value * source.choice(FACTORS), dimension)
    values = values_of(dimension)
    place = values.index(value) + source.choice((-1, 1))
    return values[min(max(place, 0), len(values) - 1)]


def settings_of(overrides: Mapping[str, Any]) -> Point:
    """Returns the settings in force at the end of a trial's schedule."""
    settings = {key: value for key, value in overrides.items() if key != SCHEDULE}
    for change in overrides.get(SCHEDULE, ()):
        settings |= change["settings"]
    return settings


def courses_of(overrides: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Returns setting -> ``(step, value)`` from each step after which a trial has a value, 0 being the beginning."""
    found = {key: [(0, float(value))] for key, value in overrides.items() if key != SCHEDULE}
    for change in overrides.get(SCHEDULE, ()):
        for key, value in change["settings"].items():
            found[key].append((change["after"], float(value)))
    return found


def continued(overrides: Mapping[str, Any], step: int, settings: Point) -> dict[str, Any]:
    """Returns a trial's overrides with other settings from a step on; as they are where nothing differs."""
    before = settings_of(overrides)
    changed = {key: value for key, value in settings.items() if before[key] != value}
    if not changed:
        return dict(overrides)
    return {**overrides, SCHEDULE: [*overrides.get(SCHEDULE, ()), {"after": step, "settings": changed}]}
