"""Confidence intervals that respect groups: whole groups are resampled, since clips of one video are no
independent witnesses.

A *statistic* is a function of resampling weights: ``(R, N) -> (R,)``, row r holding how often each of the N clips
occurs in resample r. Means and sums become matrix products, so a thousand resamples cost about as much as one
metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Array = NDArray[Any]
Statistic = Callable[[Array], Array]

MINIMUM_GROUPS = 5
"""Fewer witnesses than that have no interval: two groups would show a spread of three values as certainty."""
_CELLS = 4_000_000  # weights held at once: 32 MB of float64


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % percentile bootstrap interval.

    Attributes:
        value: on all clips.
        low, high: NaN with fewer than `MINIMUM_GROUPS` groups, or without a usable resample.
        groups, clips: what the number rests on.
        dropped: resamples in which the statistic was undefined (only one class drawn, say).
    """

    value: float
    low: float
    high: float
    groups: int
    clips: int
    dropped: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero; never without an interval."""
        return self.low > 0 or self.high < 0

    def metrics(self, name: str) -> dict[str, float]:
        """Returns ``{name, name_low, name_high}`` as floats; without an interval only the value."""
        if math.isnan(self.low) or math.isnan(self.high):
            return {name: self.value}
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True)
class Difference(Interval):
    """A minus B on the same resamples.

    Attributes:
        p: two-sided bootstrap p-value, twice the smaller share of resamples on one side of zero, at least
            2 / (resamples + 1).
    """

    p: float = math.nan


def over_runs(values: Array) -> Interval:
    """Mean of one number a run, with Student's 95 % interval: what other seeds would give, on the same test clips.

    NaN ends with a single run.
    """
    runs = len(values)
    centre = float(np.mean(values))
    half = float(t.ppf(0.975, runs - 1) * np.std(values, ddof=1) / math.sqrt(runs)) if runs > 1 else math.nan
    return Interval(centre, centre - half, centre + half, groups=runs, clips=runs)


class Bootstrap:
    """Draws of groups, made once and shared by every statistic of a split, so that any two can be compared in pairs.

    Args:
        group: ``(N,)`` group of each clip.
        resamples: how many.
        seed: the same seed and groups give the same intervals, whatever else is computed.
    """

    def __init__(self, group: Array, resamples: int = 1000, seed: int = 0) -> None:
        _, self._clip_group = np.unique(np.asarray(group), return_inverse=True)
        self.clips = len(self._clip_group)
        self.groups = int(self._clip_group.max()) + 1 if self.clips else 0
        self.resamples = resamples
        draws = np.random.default_rng(seed)
        share = np.full(max(1, self.groups), 1.0 / max(1, self.groups))
        self._counts = draws.multinomial(self.groups, share, size=resamples).astype(np.int32)  # (R, G)

    def weights(self) -> Iterator[Array]:
        """Yields the clips' weights in blocks ``(r, N)`` of bounded size, R rows in all."""
        rows = max(1, _CELLS // max(1, self.clips))
        for start in range(0, self.resamples, rows):
            yield self._counts[start : start + rows, self._clip_group].astype(np.float64)

    def distribution(self, statistic: Statistic) -> Array:
        """Returns the statistic on every resample, ``(R,)``, NaN where undefined."""
        if self.groups < MINIMUM_GROUPS:
            return np.full(self.resamples, np.nan)
        return np.concatenate([statistic(weights) for weights in self.weights()])

    def value(self, statistic: Statistic) -> float:
        """Returns the statistic on all clips."""
        return float(statistic(np.ones((1, self.clips)))[0]) if self.clips else math.nan

    def interval(self, statistic: Statistic, value: float | None = None) -> Interval:
        """Returns the statistic (or `value`, where a library computed it) with its interval."""
        value = self.value(statistic) if value is None else value
        low, high, dropped = _percentiles(self.distribution(statistic))
        return Interval(value, low, high, self.groups, self.clips, dropped)

    def difference(self, first: Statistic, second: Statistic) -> Difference:
        """Returns `first` minus `second`, paired: both see the same resamples."""
        deltas = self.distribution(first) - self.distribution(second)
        low, high, dropped = _percentiles(deltas)
        value = self.value(first) - self.value(second)
        return Difference(value, low, high, self.groups, self.clips, dropped, p=_p_value(deltas))


def mean(values: Array) -> Statistic:
    """Mean over clips of a per-clip number ``(N,)``; clips whose number is NaN do not take part."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0).astype(np.float64)

    def statistic(weights: Array) -> Array:
        return _ratio(weights @ filled, weights @ known.astype(np.float64))

    return statistic


def median(values: Array) -> Statistic:
    """Median over clips of a per-clip number ``(N,)``, as `numpy.median` of the resampled clips."""
    order = np.argsort(values, kind="stable")
    ascending = np.asarray(values, dtype=np.float64)[order]

    def statistic(weights: Array) -> Array:
        reached = np.cumsum(weights[:, order], axis=1)  # (R, N)
        total = reached[:, -1]
        lower = (reached > ((total - 1) // 2)[:, None]).argmax(axis=1)
        upper = (reached > (total // 2)[:, None]).argmax(axis=1)
        return np.where(total > 0, (ascending[lower] + ascending[upper]) / 2, np.nan)

    return statistic


def correlation(x: Array, y: Array) -> Statistic:
    """Pearson's correlation over clips of two per-clip numbers; pairs with a NaN do not take part."""
    known = np.isfinite(x) & np.isfinite(y)
    count = known.astype(np.float64)
    a, b = (np.where(known, z - z[known].mean() if known.any() else 0.0, 0.0) for z in (x, y))
    moments = np.stack([count, a, b, a * a, b * b, a * b], axis=1)  # (N, 6)

    def statistic(weights: Array) -> Array:
        n, sa, sb, saa, sbb, sab = (weights @ moments).T
        with np.errstate(divide="ignore", invalid="ignore"):
            va, vb, cov = saa / n - (sa / n) ** 2, sbb / n - (sb / n) ** 2, sab / n - sa * sb / n**2
            spread = np.sqrt(np.clip(va, 0, None) * np.clip(vb, 0, None))
            return np.where((n > 1) & (va > 1e-12) & (vb > 1e-12), cov / spread, np.nan)

    return statistic


def over_seeds(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics, one a seed, on the same resamples; where one is undefined, that of the others."""

    def averaged(weights: Array) -> Array:
        values = np.stack([one(weights) for one in statistics])  # (seeds, R)
        known = np.isfinite(values)
        return _ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0))

    return averaged


def _ratio(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _percentiles(distribution: Array) -> tuple[float, float, int]:
    usable = distribution[np.isfinite(distribution)]
    dropped = len(distribution) - len(usable)
    if len(usable) < 2:
        return math.nan, math.nan, dropped
    low, high = np.percentile(usable, [2.5, 97.5])
    return float(low), float(high), dropped


def _p_value(deltas: Array) -> float:
    usable = deltas[np.isfinite(deltas)]
    if len(usable) < 2:
        return math.nan
    side = min(int((usable <= 0).sum()), int((usable >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(usable) + 1))
