"""What a gate does with its weights, and what it could gain: diagnostics and controls.

Weights are compared among present modalities only. Shares, entropy and collapse use weights normalised to sum to 1
over the present ones, so that sigmoid gates and softmax gates can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from crossgate.evaluation.classification import softmax
from crossgate.evaluation.intervals import Bootstrap, Interval, Statistic, correlation, mean, over_seeds

Array = NDArray[Any]
Metric = Callable[[Array, Array], Statistic]
"""Probabilities ``(N, K)`` and labels ``(N,)`` -> what they are worth."""

COLLAPSED = 0.95
BINS = ((0.0, 0.0), (0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))  # severity: none, and thirds open at their left end


@dataclass(frozen=True)
class GateReport:
    """Diagnostics of one gate, each the mean over its seeds.

    Attributes:
        by_modality: modality -> mean weight of clips that have it.
        by_class: ``(K, M)`` mean weight, NaN where no clip of the class has the modality.
        by_severity: modality -> list of (lowest, highest severity, mean weight); only bins with clips.
        with_severity: modality -> Pearson correlation of weight and known severity (a good gate: negative).
        with_right: modality -> correlation of the weight with that modality's own head being right.
        entropy: mean entropy of the shares over log(number present): 1 is uniform, 0 one modality alone.
        collapse: share of clips in which one modality gets more than 95 % though others are present.
    """

    by_modality: dict[str, Interval]
    by_class: Array
    by_severity: dict[str, list[tuple[float, float, Interval]]]
    with_severity: dict[str, Interval]
    with_right: dict[str, Interval]
    entropy: Interval
    collapse: Interval

    @property
    def knows_severity(self) -> bool:
        """Whether clips of several severities are there to compare."""
        return any(len(bins) > 1 for bins in self.by_severity.values())


def diagnose(
    weights: Sequence[Array],
    present: Array,
    labels: Array,
    classes: int,
    degraded: Array,
    modalities: tuple[str, ...],
    bootstrap: Bootstrap,
    unimodal_logits: Sequence[Array] | None = None,
) -> GateReport:
    """Measures a gate on labelled clips, seed by seed: means over seeds are of what is measured, not of the weights.

    Averaged weights belong to a gate that nobody trained: five that each take one modality would look even.

    Args:
        weights: ``(N, M)`` a seed; values of absent modalities are ignored.
        present: ``(N, M)`` bool.
        labels: ``(N,)`` in 0..K-1.
        classes: K.
        degraded: ``(N, M)`` known severity, NaN where unknown.
        modalities: names, length M.
        bootstrap: made from the same clips' groups.
        unimodal_logits: ``(N, M, K)`` of the heads of the same seeds, for the correlation with being right.
    """
    seen = [np.where(present, one.astype(np.float64), np.nan) for one in weights]  # (N, M) each
    level = np.mean(seen, axis=0)  # (N, M), for means over clips: those alone may be averaged over seeds first
    shared = [shares(one, present) for one in weights]
    several = present.sum(axis=1) >= 2
    columns = list(enumerate(modalities))

    def choosing(values: Sequence[Array]) -> Interval:
        return bootstrap.interval(over_seeds([mean(np.where(several, one, np.nan)) for one in values]))

    def correlated(m: int, others: Sequence[Array]) -> Interval:
        pairs = zip(seen, others, strict=True)
        return bootstrap.interval(over_seeds([correlation(one[:, m], other[:, m]) for one, other in pairs]))

    severity = [degraded.astype(np.float64)] * len(seen)
    known = [(m, name) for m, name in columns if np.isfinite(degraded[:, m]).any()]
    right = _right(unimodal_logits or (), present, labels)
    return GateReport(
        by_modality={name: bootstrap.interval(mean(level[:, m])) for m, name in columns},
        by_class=np.stack([_nanmean(level[labels == k]) for k in range(classes)]),
        by_severity={name: _severity_bins(level[:, m], degraded[:, m], bootstrap) for m, name in columns},
        with_severity={name: correlated(m, severity) for m, name in known},
        with_right={name: correlated(m, right) for m, name in columns if right},
        entropy=choosing([entropy(one, present) for one in shared]),
        collapse=choosing([one.max(axis=1) > COLLAPSED for one in shared]),
    )


def shares(weights: Array, present: Array) -> Array:
    """Weights as shares: absent 0, rows sum to 1; uniform over the present where all weights are zero."""
    kept = np.where(present, np.clip(weights.astype(np.float64), 0, None), 0.0)
    total = kept.sum(axis=1, keepdims=True)
    return np.where(total > 1e-12, kept / np.maximum(total, 1e-12), uniform(present))


def uniform(present: Array) -> Array:
    """Equal shares of the present modalities, ``(N, M)``."""
    return present / np.maximum(present.sum(axis=1, keepdims=True), 1)


def entropy(shared: Array, present: Array) -> Array:
    """Entropy of each clip's shares over the log of the number of present modalities, ``(N,)``."""
    nats = -(shared * np.log(np.clip(shared, 1e-12, None))).sum(axis=1)
    return nats / np.log(np.maximum(present.sum(axis=1), 2))


def varies(weights: Array, present: Array) -> bool:
    """Whether a gate tells clips with the same modalities apart at all."""
    patterns = np.unique(present, axis=0)
    spans = [np.ptp(weights[(present == one).all(axis=1)], axis=0).max() for one in patterns]
    return max(spans) > 1e-6


# ---- baselines and controls: each returns class probabilities (N, K) -------------------------------------------


def mix_probabilities(shared: Array, unimodal_logits: Array) -> Array:
    """Average of the modalities' probabilities under the given shares ``(N, M)``."""
    return np.einsum("nm,nmk->nk", shared, np.nan_to_num(softmax(unimodal_logits)))


def uniform_probabilities(unimodal_logits: Array, present: Array) -> Array:
    """Plain average of the present modalities' probabilities: the baseline to beat."""
    return _or_flat(mix_probabilities(uniform(present), unimodal_logits))


def uniform_logits(unimodal_logits: Array, present: Array) -> Array:
    """Softmax of the plain average of the present modalities' logits."""
    logits = np.where(present[:, :, None], unimodal_logits, 0.0)
    return softmax(np.einsum("nm,nmk->nk", uniform(present), logits))


def single(unimodal_logits: Array, present: Array, modality: int, prior: Array) -> Array:
    """One modality's own head; clips that lack it are answered with `prior` ``(K,)``."""
    return np.where(present[:, modality, None], softmax(unimodal_logits[:, modality]), prior)


def oracle(unimodal_logits: Array, present: Array, labels: Array) -> Array:
    """Knows the truth and picks, of the present modalities, one that is right (the surest), if any is."""
    probabilities = softmax(unimodal_logits)  # (N, M, K)
    true = np.take_along_axis(probabilities, labels[:, None, None], axis=2)[:, :, 0]  # (N, M)
    merit = np.where(present, true + (probabilities.argmax(axis=2) == labels[:, None]), -1.0)
    best = merit.argmax(axis=1)
    return probabilities[np.arange(len(labels)), best]


def shuffled(weights: Array, unimodal_logits: Array, present: Array, seed: int = 0) -> Array:
    """Mixes by the weights of another clip with the same modalities present: what is left is the average gate."""
    order = np.arange(len(present))
    draws = np.random.default_rng(seed)
    for pattern in np.unique(present, axis=0):
        rows = np.flatnonzero((present == pattern).all(axis=1))
        order[rows] = draws.permutation(rows)
    return mix_probabilities(shares(weights[order], present), unimodal_logits)


def fixed_weights(
    unimodal_logits: Array, present: Array, labels: Array, metric: Metric, steps: int = 10
) -> tuple[Array, float]:
    """Fixed shares ``(M,)`` that are best on validation clips, the most even of equally good ones.

    Args:
        unimodal_logits: ``(N, M, K)``.
        present: ``(N, M)`` bool.
        labels: ``(N,)``.
        metric: what they shall be best in; higher is better.
        steps: parts that the whole is divided into.

    Returns:
        The shares and their score there, NaN where these clips cannot tell (no positive one, say).
    """
    modalities, everyone = present.shape[1], np.ones((1, len(present)))
    probabilities = np.nan_to_num(softmax(unimodal_logits))

    def merit(shared: Array) -> tuple[float, float]:
        mixed = np.einsum("nm,nmk->nk", shares(np.tile(shared, (len(present), 1)), present), probabilities)
        # Rounded, or equally good shares would differ in the last bit.
        return round(float(metric(mixed, labels)(everyone)[0]), 9), -float((shared**2).sum())

    best = np.full(modalities, 1 / modalities)
    score = merit(best)
    for parts in product(range(steps + 1), repeat=modalities - 1):
        if sum(parts) <= steps:
            shared = np.array([*parts, steps - sum(parts)]) / steps
            found = merit(shared)
            if found > score:
                best, score = shared, found
    return best, score[0]


def mask_only(present: Array, labels: Array, test_present: Array, classes: int) -> Array:
    """Answers from which modalities are present and nothing else: what absence alone gives away."""
    answer = np.tile(np.bincount(labels, minlength=classes) / max(1, len(labels)), (len(test_present), 1))
    if len(np.unique(labels)) < 2 or (present == present[:1]).all():
        return answer
    model = LogisticRegression(max_iter=300).fit(present.astype(np.float64), labels)
    answer[:] = 0.0
    answer[:, model.classes_] = model.predict_proba(test_present.astype(np.float64))
    return answer


def _right(unimodal_logits: Sequence[Array], present: Array, labels: Array) -> list[Array]:
    """Whether each head is right, ``(N, M)`` a seed, NaN where the modality is absent."""
    return [np.where(present, one.argmax(axis=2) == labels[:, None], np.nan) for one in unimodal_logits]


def _severity_bins(weight: Array, severity: Array, bootstrap: Bootstrap) -> list[tuple[float, float, Interval]]:
    found = []
    for low, high in BINS:
        inside = (severity == 0) if high == 0 else (severity > low) & (severity <= high)
        inside = inside & np.isfinite(weight)
        if inside.any():
            found.append((low, high, bootstrap.interval(mean(np.where(inside, weight, np.nan)))))
    return found


def _nanmean(x: Array) -> Array:
    known = np.isfinite(x)
    return np.where(known.any(axis=0), np.where(known, x, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)


def _or_flat(probabilities: Array) -> Array:
    empty = probabilities.sum(axis=1, keepdims=True) < 1e-12
    return np.where(empty, 1 / probabilities.shape[1], probabilities)
