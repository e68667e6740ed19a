"""What gating is worth: every gate against uniform averaging over several seeds, paired, by groups, with controls.

A competitor answers the same test clips once a seed. Its score is the mean over seeds; intervals resample groups and
move all seeds together, so that they speak of other videos, and the spread over seeds stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from crossgate.evaluation.classification import expected_calibration_error
from crossgate.evaluation.comparison import Kind, statistic
from crossgate.evaluation.intervals import Bootstrap, Difference, Interval, Statistic, mean, over_seeds

Array = NDArray[Any]
Subset = tuple[int, ...]
ORACLE = "oracle"
UNGATED = "mean"
"""The fusion that has a head on all features, as gates of features have, and no gate."""


@dataclass
class Answer:
    """A competitor's answers.

    Attributes:
        name, kind: as in the table.
        test: probabilities ``(N, K)``, one array a seed.
        weights: ``(N, M)`` a seed, empty for a method without.
        val_loss: log loss on validation, one a seed, by which one fusion is chosen; empty for what nobody could choose.
        note: what else to say of it.
    """

    name: str
    kind: Kind
    test: list[Array]
    weights: list[Array] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class StudyRow:
    """A line of the table.

    Attributes:
        score: the metric, mean over seeds, interval over groups.
        spread: standard deviation over seeds (NaN with one).
        difference: to the reference, paired; None for the reference itself.
        mcnemar: exact two-sided p of the clips that most seeds get right under one and not the other (McNemar 1947).
        nll: log loss. ece: calibration error, mean over seeds.
        gap: share of the way from the reference's accuracy to the oracle's; None without an oracle above the reference.
        ungated: of a gate, its difference to the plain mean of features under the same head, paired: what gating itself
            is worth. None for that mean, and where it was not among the answers.
    """

    name: str
    kind: Kind
    score: Interval
    spread: float
    difference: Difference | None
    mcnemar: float
    nll: Interval
    ece: float
    gap: Interval | None
    ungated: Difference | None = None
    note: str = ""


def rows(
    answers: Sequence[Answer],
    labels: Array,
    bootstrap: Bootstrap,
    reference: str,
    metric: str = "accuracy",
    positive: int | None = None,
    oracle: str = ORACLE,
) -> list[StudyRow]:
    """The table: every competitor against the reference on the same resamples.

    The oracle picks heads by knowing the label, so what it ranks first is the truth itself: it has a line in accuracy
    alone, and the gap to it is one of accuracy whatever the metric.

    Args:
        answers: in the order of the table, the reference among them.
        labels: ``(N,)`` truth.
        bootstrap: made from the same clips' groups.
        metric: a key of `comparison.TITLES`.
        positive: index of the positive class, for the metrics that need one.
        oracle: name of the upper bound, for the share of the gap.

    Raises:
        ValueError: when the reference is no entry.
    """
    by_name = {answer.name: answer for answer in answers}
    if reference not in by_name:
        raise ValueError(f"no entry is named {reference!r}")

    def scored(answer: Answer) -> Statistic:
        return over_seeds([statistic(metric, one, labels, positive) for one in answer.test])

    base = scored(by_name[reference])
    low = accuracy(by_name[reference], labels)
    high = accuracy(by_name[oracle], labels) if oracle in by_name else None
    plain = scored(by_name[UNGATED]) if UNGATED in by_name else None
    found = []
    for answer in answers:
        if answer.name == oracle and metric != "accuracy":
            continue
        own = scored(answer)
        each = [bootstrap.value(statistic(metric, one, labels, positive)) for one in answer.test]
        itself = answer.name == reference
        learned = bool(answer.val_loss)
        gated = plain is not None and learned and answer.name != UNGATED
        found.append(
            StudyRow(
                name=answer.name,
                kind=answer.kind,
                score=bootstrap.interval(own),
                spread=float(np.std(each, ddof=1)) if len(each) > 1 else math.nan,
                difference=None if itself else bootstrap.difference(own, base),
                mcnemar=math.nan if itself else mcnemar(answer.test, by_name[reference].test, labels),
                nll=bootstrap.interval(over_seeds([mean(log_loss(one, labels)) for one in answer.test])),
                ece=float(np.mean([expected_calibration_error(one, labels) for one in answer.test])),
                gap=_gap(accuracy(answer, labels), low, high, bootstrap) if learned and high else None,
                ungated=bootstrap.difference(own, plain) if gated and plain is not None else None,
                note=answer.note,
            )
        )
    return found


def accuracy(answer: Answer, labels: Array) -> Statistic:
    """A competitor's accuracy, mean over seeds."""
    return over_seeds([mean(one.argmax(axis=1) == labels) for one in answer.test])


def log_loss(probabilities: Array, labels: Array) -> Array:
    """Negative log of the true class's probability, ``(N,)``."""
    return -np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1))


def mcnemar(first: Sequence[Array], second: Sequence[Array], labels: Array) -> float:
    """Exact two-sided p over the clips that most seeds of only one of both get right; 1 where there are none."""
    right = [np.mean([one.argmax(axis=1) == labels for one in seeds], axis=0) > 0.5 for seeds in (first, second)]
    won, lost = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def chosen(answers: Sequence[Answer]) -> Answer:
    """The fusion of the lowest mean log loss on validation: the one that may be tested once without a penalty.

    Raises:
        ValueError: without a fusion that was looked at on validation.
    """
    fusions = [answer for answer in answers if answer.val_loss]
    if not fusions:
        raise ValueError("no fusion to choose from")
    return min(fusions, key=lambda answer: float(np.mean(answer.val_loss)))


def lucky_oracle(present: Array, classes: int) -> float:
    """What the oracle would reach if every head guessed: of several, one is right now and then.

    ``1 - (1 - 1/K)^n`` for a clip with n modalities, the mean over the clips of ``(N, M)``.
    """
    return float((1 - (1 - 1 / classes) ** present.sum(axis=1)).mean())


# ---- subsets ---------------------------------------------------------------------------------------------------


def subsets(modalities: int) -> list[Subset]:
    """Every non-empty set of modalities, small ones first."""
    return [one for size in range(1, modalities + 1) for one in combinations(range(modalities), size)]


def shapley(right: Mapping[Subset, Array], modalities: int) -> Array:
    """Each modality's Shapley value clip by clip, ``(N, M)``: its mean over clips is the modality's share of accuracy.

    ``phi_m = sum_S |S|! (M - |S| - 1)! / M! (v(S + m) - v(S))`` (Shapley 1953; for modalities, Wei et al. 2024,
    BalanceBenchmark).

    Args:
        right: subset -> ``(N,)`` whether (or in what share of seeds) the answer from these modalities alone is right;
            the empty subset is what the commonest class gets.
    """
    values = np.zeros((len(right[()]), modalities))
    for m in range(modalities):
        others = [one for one in range(modalities) if one != m]
        for size in range(modalities):
            factor = math.factorial(size) * math.factorial(modalities - size - 1) / math.factorial(modalities)
            for before in combinations(others, size):
                after = tuple(sorted((*before, m)))
                values[:, m] += factor * (right[after].astype(float) - right[before].astype(float))
    return values


def right_of(answers: Sequence[Array], labels: Array) -> Array:
    """Share of the seeds that are right about each clip, ``(N,)``."""
    return np.mean([one.argmax(axis=1) == labels for one in answers], axis=0)


def _gap(own: Statistic, base: Statistic, top: Statistic, bootstrap: Bootstrap) -> Interval | None:
    """Share of the way from `base` to `top`; resamples in which there is no way to go do not count."""

    def share(weights: Array) -> Array:
        low, high = base(weights), top(weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(high - low > 1e-9, (own(weights) - low) / (high - low), np.nan)

    return bootstrap.interval(share) if bootstrap.value(top) > bootstrap.value(base) else None
