"""Pictures of a search: every trial as a line through its settings, which settings mattered, and how they changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from crossgate.evaluation.style import ACCENT, LINE, MUTED, new, short, styled

Array = NDArray[Any]
Points = Sequence[Mapping[str, Any]]

Course = Sequence[tuple[int, float]]

ABSENT = "(not varied)"
_DECADE = 10.0
_TREES = 200
_FEWEST = 4


@styled
def parallel_coordinates(points: Points, values: Sequence[float | None], metric: str) -> Figure:
    """Draws a vertical axis a setting and the metric at the right; a line a trial, darker the better.

    Args:
        points: settings of each trial; keys that one lacks were not varied in it.
        values: of each trial, None where it has none (drawn pale).
        metric: its name.
    """
    keys = _keys(points)
    known = [value for value in values if value is not None]
    figure, (axis,) = new(3.6, width=max(7.4, 1.7 * (len(keys) + 1)))
    norm = Normalize(min(known, default=0.0), max(known, default=1.0) or 1.0)
    columns = [_heights([point.get(key, ABSENT) for point in points]) for key in keys]
    for row in sorted(range(len(points)), key=lambda row: (values[row] is not None, values[row] or 0.0)):
        value = values[row]
        path = [heights[row] for heights, _ in columns]
        if value is None:
            axis.plot(range(len(keys)), path, color=LINE, linewidth=0.8)
            continue
        colour = colormaps["viridis_r"](float(norm(value)))
        axis.plot(range(len(keys) + 1), [*path, float(norm(value))], color=colour, linewidth=1.4, alpha=0.85)
    for place, (_, ticks) in enumerate(columns):
        axis.axvline(place, color=MUTED, linewidth=0.8)
        for height, label in ticks:
            axis.text(place + 0.02, height, short(label, 18), fontsize=7.5, va="center", clip_on=False)
    axis.axvline(len(keys), color=MUTED, linewidth=0.8)
    for height, value in ((0.0, norm.vmin), (1.0, norm.vmax)):
        axis.text(len(keys) + 0.02, height, f"{value:.3f}", fontsize=7.5, va="center", clip_on=False)
    axis.set_xticks(range(len(keys) + 1), [short(key.rpartition(".")[2], 20) for key in keys] + [metric])
    axis.set_xlim(-0.1, len(keys) + 0.35)
    axis.set_yticks([])
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.set_title("Every trial, better ones darker")
    return figure


@styled
def schedules(
    courses: Sequence[Mapping[str, Course]], values: Sequence[float | None], steps: int, metric: str
) -> Figure:
    """Draws each setting over the steps of the training, a line a trial, darker the better, the best one thick.

    Args:
        courses: of each trial, best first: setting -> ``(step, value)`` from each step after which it has a value.
        values: of each trial, None where it has none (drawn pale).
        steps: of the training.
        metric: name of the values.
    """
    keys = _keys(courses)
    figure, axes = new(2.8, max(1, len(keys)), width=max(7.4, 3.2 * len(keys)))
    known = [value for value in values if value is not None]
    norm = Normalize(min(known, default=0.0), max(known, default=1.0) or 1.0)
    for axis, key in zip(axes, keys):
        for place in reversed(range(len(courses))):
            value, course = values[place], courses[place][key]
            at, heights = [step for step, _ in course] + [steps], [height for _, height in course]
            colour = LINE if value is None else colormaps["viridis_r"](float(norm(value)))
            axis.step(at, [*heights, heights[-1]], where="post", color=colour, linewidth=1.2 if place else 2.6)
        every = [height for course in courses for _, height in course[key]]
        if min(every) > 0 and max(every) > _DECADE * min(every):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(key)
        axis.set_xlabel("step")
        axis.set_xlim(0, steps)
    figure.suptitle(f"{metric}: {norm.vmin:.3f} pale to {norm.vmax:.3f} dark, the best one thick", fontsize=8.5)
    return figure


@styled
def importance_figure(shares: Mapping[str, float], metric: str) -> Figure:
    """Draws `importances` as bars."""
    names = list(shares)[::-1]
    figure, (axis,) = new(0.9 + 0.32 * len(names))
    axis.barh(range(len(names)), [100 * shares[name] for name in names], color=ACCENT, height=0.6)
    axis.set_yticks(range(len(names)), [short(name, 40) for name in names])
    axis.set_xlabel(f"share of what a forest explains of {metric}, %")
    axis.set_title("What mattered")
    return figure


def importances(points: Points, values: Sequence[float]) -> dict[str, float]:
    """Returns key -> share of the variance between trials that a random forest explains by it, largest first.

    As functional ANOVA does (Hutter et al. 2014) by the forest's own splits; a key that a trial lacks is a value of its
    own, so conditional keys take part. Of a few trials it is a hint, not a finding: empty below four.
    """
    from sklearn.ensemble import RandomForestRegressor

    keys = [key for key in _keys(points) if len({str(point.get(key, ABSENT)) for point in points}) > 1]
    if len(points) < _FEWEST or not keys:
        return {}
    blocks = [_encoded([point.get(key, ABSENT) for point in points]) for key in keys]
    forest = RandomForestRegressor(_TREES, random_state=0).fit(np.concatenate(blocks, axis=1), np.asarray(values))
    splits = np.split(forest.feature_importances_, np.cumsum([block.shape[1] for block in blocks])[:-1])
    shares = {key: float(part.sum()) for key, part in zip(keys, splits)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _keys(points: Points) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point))


def _numbers(column: Sequence[Any]) -> bool:
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in column if one != ABSENT)


def _encoded(column: Sequence[Any]) -> Array:
    """Numbers as they are and a mark where there is none; other values one by one."""
    if _numbers(column):
        there = np.array([one != ABSENT for one in column])
        filled = np.array([float(one) if one != ABSENT else 0.0 for one in column])
        return np.stack([filled, there], axis=1)
    names = sorted({str(one) for one in column})
    return np.array([[str(one) == name for name in names] for one in column], dtype=np.float64)


def _heights(column: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Returns each value's place between 0 and 1, and the labels of the axis; many numbers get their ends only."""
    distinct = sorted({one for one in column if one != ABSENT}, key=lambda one: (isinstance(one, str), _sortable(one)))
    if ABSENT in column:
        distinct = [ABSENT, *distinct]
    places = {str(one): number / max(1, len(distinct) - 1) for number, one in enumerate(distinct)}
    labelled = distinct if len(distinct) <= 12 else [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
    return [places[str(one)] for one in column], [(places[str(one)], str(one)) for one in labelled]


def _sortable(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)
