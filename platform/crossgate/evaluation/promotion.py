"""Whether a new model may take the champion's place: both on the same clips, compared in pairs, slice by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.config import ReleaseConfig
from crossgate.evaluation.classification import answers, softmax
from crossgate.evaluation.comparison import TITLES, positive_class, statistic
from crossgate.evaluation.intervals import Bootstrap, mean
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.slices import slices

Array = NDArray[Any]


@dataclass(frozen=True)
class Check:
    """One condition of the gate: whether it holds, and the sentence that says why."""

    passed: bool
    said: str


def quality_checks(
    challenger: Predictions,
    champion: Predictions,
    task: str,
    classes: Sequence[str],
    positive: str,
    gate: ReleaseConfig,
    *,
    thresholds: tuple[float, float] = (0.5, 0.5),
    resamples: int = 1000,
    seed: int = 0,
) -> list[Check]:
    """Compares two models' predictions of the frozen evaluation set.

    As a whole the challenger must be shown not to be worse: the lower end of the paired difference's interval stays
    above minus the margin (non-inferiority), so a set too small to tell refuses. A slice is refused by the
    difference itself, since no slice is large enough for such a proof.

    Args:
        challenger, champion: with logits in the order of `classes`; matched by key.
        task: label name.
        positive: positive class of a binary task (then average precision counts as a whole, else accuracy).
        gate: margins.
        thresholds: of challenger and champion, by which each answers where the task is binary.
        resamples, seed: of the bootstrap over groups.

    Raises:
        ValueError: no labelled clips, no logits, or clips that only one of them has.
    """
    challenger = challenger.labelled(task)
    if not len(challenger):
        raise ValueError(f"no clip of the evaluation set has a label of task {task!r}")
    champion = champion.aligned(challenger.keys)
    if challenger.logits is None or champion.logits is None:
        raise ValueError("a model without logits cannot be compared")
    labels = challenger.labels[task]
    bootstrap = Bootstrap(challenger.group, resamples, seed)
    index = positive_class(classes, positive)
    metric = "accuracy" if index is None else "average_precision"
    new, old = (softmax(one.logits) for one in (challenger, champion) if one.logits is not None)
    checks = [_whole(bootstrap, metric, new, old, labels, index, gate.margin)]
    ours, theirs = (answers(one, index, threshold) for one, threshold in zip((new, old), thresholds))
    right = (ours == labels).astype(np.float64) - (theirs == labels)
    small = []
    # The challenger's own facts count where both know a modality.
    for name, rows in (slices(champion, task, classes) | slices(challenger, task, classes)).items():
        count = int(rows.sum())
        if count < gate.slice_clips:
            small.append(f"{name} ({count})")
            continue
        one = bootstrap.interval(mean(np.where(rows, right, np.nan)))
        said = f"{name} ({count} clips): accuracy {_signed(one.value, one.low, one.high)}"
        checks.append(Check(one.value >= -gate.slice_margin, f"{said}, at most {gate.slice_margin:g} may be lost"))
    if small:
        checks.append(Check(True, f"fewer than {gate.slice_clips} clips, not judged: {', '.join(small)}"))
    return checks


def latency_checks(challenger_ms: float, champion_ms: float, gate: ReleaseConfig) -> list[Check]:
    """Compares the forward passes of one clip, measured side by side."""
    ratio = challenger_ms / champion_ms
    said = f"forward pass {challenger_ms:.1f} ms, the champion's {champion_ms:.1f} ms"
    checks = [Check(ratio <= gate.latency_ratio, f"{said}: {ratio:.2f} of it, at most {gate.latency_ratio:g}")]
    if gate.latency_ms:
        bound = f"forward pass {challenger_ms:.1f} ms, at most {gate.latency_ms:g} ms"
        checks.append(Check(challenger_ms <= gate.latency_ms, bound))
    return checks


def _whole(
    bootstrap: Bootstrap, metric: str, new: Array, old: Array, labels: Array, index: int | None, margin: float
) -> Check:
    first, second = (statistic(metric, scores, labels, index) for scores in (new, old))
    delta = bootstrap.difference(first, second)
    said = (
        f"{TITLES[metric]} {bootstrap.value(first):.3f}, the champion's {bootstrap.value(second):.3f}: difference "
        f"{_signed(delta.value, delta.low, delta.high)} on {delta.clips} clips of {delta.groups} groups"
    )
    if math.isnan(delta.low):
        return Check(False, f"{said}: too few groups for an interval")
    return Check(delta.low >= -margin, f"{said}, its lower end must reach {-margin:g}")


def _signed(value: float, low: float, high: float) -> str:
    return f"{value:+.3f}" if math.isnan(low) else f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
