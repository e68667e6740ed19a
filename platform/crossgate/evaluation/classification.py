"""Scores of a classifier: scikit-learn and torchmetrics compute them, `intervals` puts intervals around them.

The resampled values use weighted forms of the same metrics, vectorised over resamples; tests hold them to
scikit-learn's ``sample_weight``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_calibration_error

from crossgate.evaluation.intervals import Bootstrap, Interval, Statistic, mean

Array = NDArray[Any]


@dataclass(frozen=True)
class Thresholds:
    """Decision thresholds on the positive class's probability, chosen on validation.

    Attributes:
        decision: highest balanced accuracy on validation.
        low_alarm: lowest threshold whose false-positive rate on validation is at most the fixed one.
    """

    decision: float
    low_alarm: float


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis, in float64."""
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def answers(probabilities: Array, index: int | None, threshold: float) -> Array:
    """Returns (N,) class indices: by the threshold where the task is binary, else the likeliest class.

    Args:
        probabilities: ``(N, K)``.
        index: of the positive class; None for a task without.
        threshold: probability of the positive class from which on it is the answer.
    """
    if index is None:
        return np.asarray(probabilities.argmax(axis=1))
    return np.where(probabilities[:, index] >= threshold, index, 1 - index)


def multiclass(probabilities: Array, labels: Array, bootstrap: Bootstrap) -> dict[str, Interval]:
    """Top-1, top-5 (from six classes on), mean-class accuracy, macro-F1, NLL and ECE.

    Mean-class accuracy and macro-F1 average over the classes that occur among `labels` (in a resample: that occur
    in it).

    Args:
        probabilities: ``(N, K)``, rows sum to 1.
        labels: ``(N,)`` in 0..K-1.
        bootstrap: made from the same clips' groups.
    """
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    support = np.unique(labels)
    log_loss = -np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1))
    scores = {
        "accuracy": bootstrap.interval(mean(predicted == labels), float(sk.accuracy_score(labels, predicted))),
        "mean_class_accuracy": bootstrap.interval(
            mean_class_accuracy(predicted, labels), _quiet(sk.balanced_accuracy_score, labels, predicted)
        ),
        "macro_f1": bootstrap.interval(
            macro_f1(predicted, labels),
            float(sk.f1_score(labels, predicted, labels=support, average="macro", zero_division=0)),
        ),
        "nll": bootstrap.interval(mean(log_loss)),
        "ece": _bare(expected_calibration_error(probabilities, labels), bootstrap),
    }
    if classes > 5:
        hit = (np.argsort(-probabilities, axis=1, kind="stable")[:, :5] == labels[:, None]).any(axis=1)
        scores["top5_accuracy"] = bootstrap.interval(mean(hit))
    return scores


def binary(scores: Array, positive: Array, thresholds: Thresholds, bootstrap: Bootstrap) -> dict[str, Interval]:
    """AP, ROC-AUC, and at thresholds from validation: F1, accuracy, balanced accuracy, misses at a fixed alarm rate.

    Args:
        scores: ``(N,)`` probability of the positive class.
        positive: ``(N,)`` bool truth.
        thresholds: from `choose_thresholds` on validation, never on these clips.
        bootstrap: made from the same clips' groups.
    """
    truth = positive.astype(np.int64)
    said, alarm = scores >= thresholds.decision, scores >= thresholds.low_alarm
    two_sided = np.stack([1 - scores, scores], axis=1)
    log_loss = -np.log(np.clip(np.where(positive, scores, 1 - scores), 1e-12, 1))
    both = 0 < truth.sum() < len(truth)
    return {
        "average_precision": bootstrap.interval(
            average_precision(scores, positive),
            float(sk.average_precision_score(truth, scores)) if truth.any() else math.nan,
        ),
        "roc_auc": bootstrap.interval(
            roc_auc(scores, positive), float(sk.roc_auc_score(truth, scores)) if both else math.nan
        ),
        "f1": bootstrap.interval(f1(said, positive), float(sk.f1_score(truth, said, zero_division=0))),
        "accuracy": bootstrap.interval(mean(said == positive), float(sk.accuracy_score(truth, said))),
        "accuracy_argmax": bootstrap.interval(
            mean((scores > 0.5) == positive), float(sk.accuracy_score(truth, scores > 0.5))
        ),
        "balanced_accuracy": bootstrap.interval(
            mean_class_accuracy(said.astype(np.int64), truth), _quiet(sk.balanced_accuracy_score, truth, said)
        ),
        "fnr_at_fixed_fpr": bootstrap.interval(mean(np.where(positive, ~alarm, np.nan))),
        "fpr_at_fixed_fpr": bootstrap.interval(mean(np.where(positive, np.nan, alarm))),
        "nll": bootstrap.interval(mean(log_loss)),
        "ece": _bare(expected_calibration_error(two_sided, truth), bootstrap),
    }


def choose_thresholds(scores: Array, positive: Array, fixed_fpr: float) -> Thresholds:
    """Chooses both thresholds on validation scores; 0.5 where validation has one class only.

    Candidates lie halfway between neighbouring scores, below all and above all; of equally good decision
    thresholds the nearest to 0.5 is taken.
    """
    if positive.all() or not positive.any():
        return Thresholds(0.5, 0.5)
    values = np.unique(scores.astype(np.float64))
    cuts = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2, [np.nextafter(values[-1], np.inf)]])
    false_rate, true_rate = (_share_above(scores[side], cuts) for side in (~positive, positive))
    youden = true_rate - false_rate
    best = cuts[youden >= youden.max() - 1e-12]
    return Thresholds(
        decision=float(best[np.abs(best - 0.5).argmin()]),
        low_alarm=float(cuts[false_rate <= fixed_fpr + 1e-12].min()),
    )


def chance(labels: Array, classes: int, reference: Array | None = None) -> dict[str, float]:
    """Accuracy of knowing nothing.

    Args:
        labels: ``(N,)`` truth of the measured clips.
        classes: K.
        reference: training labels; the majority class is then theirs, else the commonest among `labels`, which
            is the strictest.

    Returns:
        ``majority``: always the commonest class; ``uniform``: 1 / K.
    """
    pool = labels if reference is None or not len(reference) else reference
    common = np.bincount(pool, minlength=classes).argmax() if len(pool) else 0
    return {"majority": float((labels == common).mean()) if len(labels) else math.nan, "uniform": 1 / classes}


def expected_calibration_error(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017), by torchmetrics."""
    if not len(labels):
        return math.nan
    clipped = torch.from_numpy(np.clip(probabilities, 0, 1))
    return float(
        multiclass_calibration_error(
            clipped, torch.from_numpy(labels.astype(np.int64)), probabilities.shape[1], n_bins=bins
        )
    )


# ---- statistics over resampling weights ------------------------------------------------------------------------


def mean_class_accuracy(predicted: Array, labels: Array) -> Statistic:
    """Recall averaged over the classes that a resample holds."""
    matrix = _one_hot(labels)

    def statistic(weights: Array) -> Array:
        support = weights @ matrix  # (R, K)
        right = weights @ (matrix * (predicted == labels)[:, None])
        return _nanmean(right, support)

    return statistic


def macro_f1(predicted: Array, labels: Array) -> Statistic:
    """F1 averaged over the classes that a resample holds."""
    classes = np.unique(labels)
    truth = (labels[:, None] == classes).astype(np.float64)  # (N, K)
    said = (predicted[:, None] == classes).astype(np.float64)

    def statistic(weights: Array) -> Array:
        support = weights @ truth
        score = 2 * (weights @ (truth * said)) / np.maximum(support + weights @ said, 1e-12)
        return _nanmean(score * support, support)

    return statistic


def f1(said: Array, positive: Array) -> Statistic:
    """F1 of the positive class, 0 where nothing is positive and nothing was said to be."""

    def statistic(weights: Array) -> Array:
        both = weights @ (said & positive).astype(np.float64)
        return 2 * both / np.maximum(weights @ said.astype(np.float64) + weights @ positive.astype(np.float64), 1e-12)

    return statistic


def average_precision(scores: Array, positive: Array) -> Statistic:
    """Area under the stepwise precision-recall curve, as scikit-learn's `average_precision_score`."""
    order, last = _descending(scores)
    truth = positive[order].astype(np.float64)

    def statistic(weights: Array) -> Array:
        w = weights[:, order]
        hits = np.cumsum(w * truth, axis=1)[:, last]
        said = np.cumsum(w, axis=1)[:, last]
        precision = hits / np.maximum(said, 1e-12)
        gained = np.diff(hits, axis=1, prepend=0.0)
        total = hits[:, -1]
        return np.where(total > 0, (gained * precision).sum(axis=1) / np.maximum(total, 1e-12), np.nan)

    return statistic


def roc_auc(scores: Array, positive: Array) -> Statistic:
    """Area under the ROC curve, ties counted half."""
    order, last = _descending(scores)
    truth = positive[order].astype(np.float64)

    def statistic(weights: Array) -> Array:
        w = weights[:, order]
        hits = np.cumsum(w * truth, axis=1)[:, last]
        alarms = np.cumsum(w * (1 - truth), axis=1)[:, last]
        steps, before = np.diff(alarms, axis=1, prepend=0.0), np.diff(hits, axis=1, prepend=0.0)
        area = (steps * (hits - before / 2)).sum(axis=1)
        full = hits[:, -1] * alarms[:, -1]
        return np.where(full > 0, area / np.maximum(full, 1e-12), np.nan)

    return statistic


def _descending(scores: Array) -> tuple[Array, Array]:
    """Order of descending score, and the last position of each run of equal scores."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    return order, np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))


def _share_above(scores: Array, cuts: Array) -> Array:
    return 1 - np.searchsorted(np.sort(scores.astype(np.float64)), cuts, side="left") / len(scores)


def _one_hot(labels: Array) -> Array:
    return (labels[:, None] == np.unique(labels)).astype(np.float64)


def _nanmean(numerator: Array, support: Array) -> Array:
    held = support > 0
    score = np.where(held, numerator / np.maximum(support, 1e-12), 0.0)
    return np.where(held.any(axis=1), score.sum(axis=1) / np.maximum(held.sum(axis=1), 1), np.nan)


def _bare(value: float, bootstrap: Bootstrap) -> Interval:
    """A value without an interval: resampling biases a calibration error upwards."""
    return Interval(value, math.nan, math.nan, bootstrap.groups, bootstrap.clips)


def _quiet(metric: Callable[..., float], truth: Array, said: Array) -> float:
    with warnings.catch_warnings():  # a predicted class without clips is expected in small splits
        warnings.simplefilter("ignore", UserWarning)
        return float(metric(truth, said))
