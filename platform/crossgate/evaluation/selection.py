"""Whether the winner of a search beats uniform averaging, with the luck of having tried many taken off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.evaluation.classification import softmax
from crossgate.evaluation.comparison import TITLES, statistic
from crossgate.evaluation.intervals import Bootstrap
from crossgate.evaluation.predictions import Predictions

Array = NDArray[Any]

LEVEL = 0.05
ANSWERS = "validation.npz"
_NONE = "no gate beat averaging"


@dataclass(frozen=True)
class Answers:
    """What one trial said about the labelled validation clips.

    Attributes:
        logits: ``(N, K)``.
        labels: ``(N,)`` class.
        group: ``(N,)`` source video or subject.
        keys: ``(N,)`` names of the clips.
    """

    logits: Array
    labels: Array
    group: Array
    keys: Array

    @classmethod
    def of(cls, predictions: Predictions, task: str) -> Answers:
        """Takes them from predictions.

        Raises:
            ValueError: for a model without classes.
        """
        known = predictions.labelled(task)
        if known.logits is None:
            raise ValueError("no logits")
        return cls(known.logits.astype(np.float32), known.labels[task], known.group, np.array(known.keys))

    @classmethod
    def read(cls, run_dir: str | Path) -> Answers | None:
        """Reads what `write` wrote; None where there is nothing."""
        path = Path(run_dir) / ANSWERS
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as kept:
            return cls(*(kept[name] for name in ("logits", "labels", "group", "keys")))

    def write(self, run_dir: str | Path) -> None:
        """Writes them beside and renames."""
        partial = Path(run_dir) / f".{ANSWERS}.partial.npz"
        np.savez_compressed(partial, **vars(self))
        partial.replace(Path(run_dir) / ANSWERS)


@dataclass(frozen=True)
class Verdict:
    """How the winner compares with uniform averaging.

    Attributes:
        beats: whether there is evidence that it is better.
        difference: winner minus average, mean over seeds; NaN where it could not be measured.
        low, high: its 95 % interval over groups.
        p: one-sided, for the best of all that ended.
        said: the sentence.
    """

    beats: bool
    difference: float
    low: float
    high: float
    p: float
    said: str

    def metrics(self) -> dict[str, float]:
        """Returns what could be measured, under flat names."""
        found = {"difference": self.difference, "difference_low": self.low, "difference_high": self.high, "p": self.p}
        known = {f"search/over_averaging/{name}": value for name, value in found.items() if not math.isnan(value)}
        return known | {"search/over_averaging/beats": float(self.beats)}


def judge(
    candidates: Mapping[str, Mapping[int, Answers]],
    reference: Mapping[int, Answers],
    winner: str,
    metric: str,
    positive: int | None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    caveats: Sequence[str] = (),
) -> Verdict:
    """Tests the winner against the average on the same validation groups and resamples, seed by seed.

    The winner is the best of many, and the best of many looks good by luck alone. So the difference is compared with
    the largest one that resampled groups give to *any* candidate when each is centred on its own (White's reality
    check, Econometrica 68, 2000): the p-value is the share of resamples in which luck reaches what the winner has.

    Args:
        candidates: every finished trial that is not the average -> seed -> its answers.
        reference: seed -> answers of uniform averaging; a pair is of the same seed, other seeds do not count.
        winner: a name among the candidates, or of the average itself.
        metric: a key of `TITLES`.
        positive: index of the positive class, for the metrics that need one.
        resamples, seed: of the bootstrap.
        caveats: what p does not know, for the end of the sentence.
    """
    if winner not in candidates:
        return _nothing("the best is uniform averaging itself")
    if metric not in TITLES:
        return _nothing(f"'{metric}' cannot be tested clip by clip")
    first = next(iter(reference.values()))
    reference = {seed: one for seed, one in reference.items() if _same_clips(one, first)}
    alike = {name: {s: one for s, one in own.items() if _same_clips(one, first)} for name, own in candidates.items()}
    others = sum(bool(candidates[name]) and not own for name, own in alike.items())
    if candidates[winner] and not alike[winner]:
        return _nothing(f"{winner} was measured on other validation clips")
    shared = {name: sorted(own.keys() & reference.keys()) for name, own in alike.items()}
    if not shared[winner]:
        return _nothing(f"uniform averaging finished with no seed of {winner}")
    bootstrap = Bootstrap(first.group, resamples, seed)
    scores = {number: _spread(bootstrap, one, first, metric, positive) for number, one in reference.items()}
    values, luck = {}, np.full(resamples, -np.inf)
    mine: Array = np.full(resamples, np.nan)
    for name, seeds in shared.items():
        if not seeds:
            continue
        answers = candidates[name]
        pairs = [(_spread(bootstrap, answers[one], first, metric, positive), scores[one]) for one in seeds]
        value = float(np.mean([own[0] - theirs[0] for own, theirs in pairs]))
        drawn = np.mean([own[1] - theirs[1] for own, theirs in pairs], axis=0)  # (R,)
        values[name] = value
        luck = np.fmax(luck, drawn - value)
        if name == winner:
            mine = drawn
    usable = mine[np.isfinite(mine)]
    if len(usable) < 2:
        return _nothing(f"{bootstrap.groups} validation groups are too few for a test")
    low, high = np.percentile(usable, [2.5, 97.5])
    reached = luck[np.isfinite(luck)] >= values[winner]
    p = (1 + int(reached.sum())) / (1 + len(reached))
    beats = p < LEVEL and values[winner] > 0
    count = len(shared[winner])
    evidence = (
        f"{100 * values[winner]:+.1f} points of {TITLES[metric]} ({100 * low:+.1f} to {100 * high:+.1f}) over uniform "
        f"averaging, {count} seed{'s' if count > 1 else ''}, {bootstrap.groups} validation groups, p = {p:.3f} as the "
        f"best of {len(values)} that finished"
    )
    apart = [f"{others} measured on other validation clips not counted"] if others else []
    evidence = "; ".join([evidence, *apart, *caveats])
    said = f"{winner} beats averaging: {evidence}" if beats else f"{_NONE}: {winner} has {evidence}"
    return Verdict(beats, values[winner], float(low), float(high), p, said)


def _nothing(why: str) -> Verdict:
    return Verdict(False, math.nan, math.nan, math.nan, math.nan, f"{_NONE}: {why}")


def _same_clips(one: Answers, other: Answers) -> bool:
    return np.array_equal(np.sort(one.keys), np.sort(other.keys))


def _spread(
    bootstrap: Bootstrap, answers: Answers, first: Answers, metric: str, positive: int | None
) -> tuple[float, Array]:
    """Returns the metric on all clips, and on every resample ``(R,)``."""
    rows = np.argsort(answers.keys)[np.searchsorted(np.sort(answers.keys), first.keys)]
    measured = statistic(metric, softmax(answers.logits[rows]), first.labels, positive)
    return bootstrap.value(measured), bootstrap.distribution(measured)
