"""The timeline's ticks are at times that people name."""

from __future__ import annotations

import numpy as np
import pytest

from crossgate.evaluation.timeline import tick_seconds, timeline


@pytest.mark.parametrize(
    ("end", "step"), [(1.0, 1), (9.0, 1), (9.1, 2), (461.0, 60), (3 * 3600.0, 1800), (90_000.0, 4 * 3600)]
)
def test_ticks_are_round_and_few(end: float, step: int) -> None:
    assert tick_seconds(end) == step


@pytest.mark.parametrize(
    ("scale", "labels"), [(1.0, ["0:00", "1:00", "2:00"]), (60.0, ["0:00:00", "1:00:00", "2:00:00"])]
)
def test_the_last_window_is_whole_and_ticks_are_minutes_or_hours(scale: float, labels: list[str]) -> None:
    times = scale * np.arange(0.5, 121.0)
    figure = timeline(times, np.zeros(121), {}, np.zeros(121, bool), [], label="fight", on=0.6, off=0.4)
    axes = figure.axes[-1]
    figure.canvas.draw()
    assert axes.get_xlim() == (0.0, scale * 121)
    shown = [tick.get_text() for tick in axes.get_xticklabels()]
    assert set(labels) <= set(shown)
