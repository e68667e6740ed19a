"""What a model saw over time: pictures, the watched class's score with its alarms, gate weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator
from numpy.typing import NDArray

from crossgate.evaluation.style import ACCENT, MUTED, colour, styled

Array = NDArray[Any]
_PICTURES = 10
_TICKS = 9
_ROUND = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
"""Seconds between ticks that read well as minutes and hours."""


class Thumbnail(NamedTuple):
    """A picture ``(H, W, 3)`` uint8 and when it was, in seconds."""

    seconds: float
    picture: Array


@styled
def timeline(
    times: Array,
    scores: Array,
    weights: Mapping[str, Array],
    alarms: Array,
    thumbnails: Sequence[Thumbnail],
    *,
    label: str,
    on: float,
    off: float,
) -> Figure:
    """Draws N windows over time.

    Args:
        times: ``(N,)`` middles of the windows in seconds.
        scores: ``(N,)`` of the watched class.
        weights: modality -> ``(N,)`` gate weights; empty for a fusion without a gate.
        alarms: ``(N,)`` bool.
        thumbnails: in order of time; some of them are shown.
        label: watched class.
        on, off: the alarm's thresholds.
    """
    heights = [1.1, 2.4] + ([1.5] if weights else [])
    figure = Figure(figsize=(11, sum(heights) + 0.8), layout="constrained")
    strip, *rows = figure.subplots(len(heights), 1, height_ratios=heights, sharex=True)
    half = float(np.median(np.diff(times))) / 2 if len(times) > 1 else 0.5
    begin, end = 0.0, max([1.0, *(times[-1:] + half), *(one.seconds for one in thumbnails[-1:])])
    _strip(strip, thumbnails, begin, end)
    score = rows[0]
    few = "o" if len(times) < 3 else ""  # of one window there is no line to draw
    score.plot(times, scores, color=ACCENT, marker=few)
    score.axhline(on, color=MUTED, linewidth=0.9, linestyle="--")
    score.axhline(off, color=MUTED, linewidth=0.9, linestyle=":")
    for at, name in ((on, "on"), (off, "off")):
        score.annotate(name, (1, at), (4, 0), ("axes fraction", "data"), "offset points", color=MUTED, va="center")
    for first, last in _spans(alarms):
        score.axvspan(times[first] - half, times[last] + half, color="#d55e00", alpha=0.18, linewidth=0)
    score.set(ylim=(0, 1), ylabel="score", title=f"{label} (shaded: alarm)", xlim=(begin, end))
    if weights:
        # Over the whole of the first and last window, not from middle to middle.
        edges = np.concatenate([times[:1] - half, times, times[-1:] + half])
        shares = [np.nan_to_num(np.concatenate([w[:1], w, w[-1:]])) for w in weights.values()]
        rows[1].stackplot(edges, *shares, colors=[colour(name) for name in weights], alpha=0.85)
        rows[1].set(ylim=(0, 1), ylabel="share", title="gate weights")
        handles = [rows[1].fill_between([], [], color=colour(name), alpha=0.85, label=name) for name in weights]
        rows[1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    hours = end >= 3600
    rows[-1].set_xlabel("time (h:min:s)" if hours else "time (min:s)")
    rows[-1].xaxis.set_major_locator(MultipleLocator(tick_seconds(end)))
    rows[-1].xaxis.set_major_formatter(FuncFormatter(lambda t, _: _clock(int(t), hours)))
    return figure


def tick_seconds(end: float) -> int:
    """Returns how far ticks lie apart, so that few enough of them are at round times."""
    return next((step for step in _ROUND if end / step <= _TICKS), int(end // _TICKS))


def _clock(seconds: int, hours: bool) -> str:
    if not hours:
        return f"{seconds // 60}:{seconds % 60:02d}"
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _strip(axes: Any, thumbnails: Sequence[Thumbnail], begin: float, end: float) -> None:
    axes.set(ylim=(0, 1), xlim=(begin, end), yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(bottom=False)
    if not thumbnails:
        return
    width = (end - begin) / _PICTURES
    for number in range(_PICTURES):
        middle = begin + (number + 0.5) * width
        picture = min(thumbnails, key=lambda one: abs(one.seconds - middle)).picture
        inset = axes.inset_axes((middle - width * 0.48, 0.0, width * 0.96, 1.0), transform=axes.transData)
        inset.imshow(picture)
        inset.set_anchor("C")
        inset.axis("off")


def _spans(alarms: Array) -> list[tuple[int, int]]:
    """Returns (first, last) of each run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], alarms.astype(np.int8), [0]))))
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2])]
