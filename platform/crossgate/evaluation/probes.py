"""What frozen features know: a kNN classifier and a linear probe, fitted on the training split alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

Array = NDArray[Any]

TEMPERATURE = 0.07
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse regularisation C, strongest regularisation first


@dataclass
class Samples:
    """Features of one split for a probe.

    Attributes:
        features: ``(N, D)``.
        labels: ``(N,)`` in 0..K-1.
        group: ``(N,)``.
        known: ``(N,)`` bool, False where the clip lacks the modality: such clips teach nothing, and are answered
            with the class frequencies of the training clips.
    """

    features: Array
    labels: Array
    group: Array
    known: Array


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe: ``probabilities`` are ``(N, K)`` on the test clips, `strength` the chosen C."""

    probabilities: Array
    strength: float


def knn(train: Samples, test: Samples, classes: int, neighbours: int, tile: int = 1024) -> Array:
    """Weighted kNN (Wu et al. 2018): the k nearest training clips vote with weight exp(cosine / 0.07).

    Features are centred by the training mean first, otherwise the cosine of an untrained encoder, whose features
    share one large direction, would say nothing.

    Returns:
        ``(N, K)`` class probabilities of the test clips.
    """
    prior = _frequencies(train.labels, classes)
    answer = np.tile(prior, (len(test.labels), 1))
    if not train.known.any() or not test.known.any():
        return answer
    centre = train.features[train.known].mean(axis=0, dtype=np.float64)
    bank, queries = (_unit(split.features[split.known] - centre) for split in (train, test))
    votes = np.eye(classes)[train.labels[train.known]]  # (bank, K)
    k = min(neighbours, len(bank))
    scores = np.empty((len(queries), classes))
    for start in range(0, len(queries), tile):
        similarity = queries[start : start + tile] @ bank.T  # (tile, bank)
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        closeness = np.take_along_axis(similarity, nearest, axis=1)
        weight = np.exp((closeness - closeness.max(axis=1, keepdims=True)) / TEMPERATURE)
        scores[start : start + tile] = np.einsum("qk,qkc->qc", weight, votes[nearest])
    answer[test.known] = scores / scores.sum(axis=1, keepdims=True)
    return answer


def linear_probe(train: Samples, test: Samples, classes: int, val: Samples | None = None, seed: int = 0) -> Probe:
    """Multinomial logistic regression on standardised features.

    The regularisation with the lowest log loss on `val` is taken; without labelled validation clips, by
    cross-validation over the groups of `train`. The test clips are only answered.

    Raises:
        ValueError: when `train` has no labelled clip with the feature.
    """
    if not train.known.any():
        raise ValueError("no training clip has this feature")
    prior = _frequencies(train.labels, classes)
    fit, answer = _known(train), np.tile(prior, (len(test.labels), 1))
    if len(np.unique(fit.labels)) < 2:
        return Probe(answer, STRENGTHS[0])
    strength = _choose(fit, _known(val) if val is not None else None, classes, seed)
    if test.known.any():
        answer[test.known] = _answers(fit, test.features[test.known], classes, [strength], seed)[0]
    return Probe(answer, strength)


def _choose(train: Samples, val: Samples | None, classes: int, seed: int) -> float:
    """Returns the inverse regularisation of the lowest held-out log loss, the stronger one on a tie."""
    if val is not None and len(val.labels):
        folds = [(train, val)]
    elif len(np.unique(train.group)) >= 2:
        splitter = GroupKFold(n_splits=min(5, len(np.unique(train.group))))
        pairs = splitter.split(train.features, train.labels, train.group)
        folds = [(_rows(train, fit), _rows(train, held)) for fit, held in pairs]
        folds = [(fit, held) for fit, held in folds if len(np.unique(fit.labels)) > 1]
    else:
        folds = []
    if not folds:
        return STRENGTHS[0]
    losses = np.zeros(len(STRENGTHS))
    for fit, held in folds:
        for i, probabilities in enumerate(_answers(fit, held.features, classes, list(STRENGTHS), seed)):
            losses[i] += log_loss(held.labels, _safe(probabilities), labels=np.arange(classes)) * len(held.labels)
    return STRENGTHS[int(losses.argmin())]


def _answers(train: Samples, features: Array, classes: int, strengths: list[float], seed: int) -> list[Array]:
    """Class probabilities ``(N, K)`` at each strength; each fit starts from the one before."""
    scale = StandardScaler().fit(train.features.astype(np.float64))
    x, queries = (scale.transform(one.astype(np.float64)) for one in (train.features, features))
    model = LogisticRegression(max_iter=300, tol=1e-3, warm_start=True, random_state=seed)
    answers = []
    for strength in strengths:
        model.set_params(C=strength).fit(x, train.labels)
        full = np.zeros((len(queries), classes))
        full[:, model.classes_] = model.predict_proba(queries)
        answers.append(full)
    return answers


def _known(samples: Samples) -> Samples:
    return _rows(samples, np.flatnonzero(samples.known))


def _rows(samples: Samples, rows: Array) -> Samples:
    return Samples(samples.features[rows], samples.labels[rows], samples.group[rows], samples.known[rows])


def _frequencies(labels: Array, classes: int) -> Array:
    counts = np.bincount(labels, minlength=classes).astype(np.float64)
    return counts / counts.sum() if counts.sum() else np.full(classes, 1 / classes)


def _safe(probabilities: Array) -> Array:
    clipped = np.clip(probabilities, 1e-6, None)  # a class without training clips must not make the loss infinite
    return clipped / clipped.sum(axis=1, keepdims=True)


def _unit(x: Array) -> Array:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
