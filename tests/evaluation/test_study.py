"""The arithmetic of a study, against hand-made truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crossgate.evaluation import gates
from crossgate.evaluation.comparison import REFERENCE
from crossgate.evaluation.intervals import Bootstrap
from crossgate.evaluation.study import Answer, chosen, lucky_oracle, mcnemar, rows, shapley, subsets

LABELS = np.array([0, 1, 0, 1, 0, 1, 0, 1])


def says(right: list[int]) -> np.ndarray:
    """Probabilities that are right where the list says 1."""
    classes = np.where(np.array(right) == 1, LABELS, 1 - LABELS)
    return np.eye(2)[classes] * 0.8 + 0.1


def test_mcnemar_counts_only_clips_on_which_both_differ() -> None:
    a, b = says([1, 1, 1, 1, 1, 1, 0, 0]), says([0, 0, 0, 0, 0, 1, 0, 0])
    assert mcnemar([a], [b], LABELS) == pytest.approx(2 * 0.5**5)  # five won, none lost
    assert mcnemar([b], [a], LABELS) == mcnemar([a], [b], LABELS)
    assert mcnemar([a], [a], LABELS) == 1
    assert mcnemar([a, a, b], [b], LABELS) == mcnemar([a], [b], LABELS), "most seeds decide"


def test_scores_are_means_over_seeds_and_differences_are_paired() -> None:
    good, bad = says([1] * 8), says([1, 1, 1, 1, 0, 0, 0, 0])
    answers = [
        Answer(REFERENCE, "average", [bad, bad]),
        Answer("g", "gate", [good, bad], val_loss=[1.0, 1.0]),
        Answer("oracle", "control", [good]),
    ]
    lines = {line.name: line for line in rows(answers, LABELS, Bootstrap(np.arange(8), 200), REFERENCE)}
    assert lines["g"].score.value == 0.75 and lines["g"].spread == pytest.approx(np.std([1, 0.5], ddof=1))
    difference = lines["g"].difference
    assert difference is not None and difference.value == 0.25 and difference.low >= 0, "never worse in any resample"
    assert lines[REFERENCE].difference is None and math.isnan(lines[REFERENCE].mcnemar)
    gap = lines["g"].gap
    assert gap is not None and gap.value == 0.5
    assert lines[REFERENCE].gap is None and lines["oracle"].gap is None
    with pytest.raises(ValueError, match="no entry"):
        rows(answers[1:], LABELS, Bootstrap(np.arange(8)), REFERENCE)


def test_the_oracle_has_no_rank_and_its_gap_is_one_of_accuracy() -> None:
    good, bad = says([1] * 8), says([1, 1, 1, 1, 0, 0, 0, 0])
    bad[0] = 0.6, 0.4  # less sure, so that average precision is not accuracy
    half = says([1, 1, 1, 1, 1, 1, 0, 0])
    answers = [
        Answer(REFERENCE, "average", [bad]),
        Answer("g", "gate", [half], val_loss=[1.0]),
        Answer("oracle", "control", [good]),
    ]
    by_metric = {
        metric: {line.name: line for line in rows(answers, LABELS, Bootstrap(np.arange(8), 200), REFERENCE, metric, 1)}
        for metric in ("accuracy", "average_precision")
    }
    ranked = by_metric["average_precision"]
    assert list(ranked) == [REFERENCE, "g"] and "oracle" in by_metric["accuracy"]
    assert ranked["g"].score.value != by_metric["accuracy"]["g"].score.value
    gap = ranked["g"].gap
    assert gap == by_metric["accuracy"]["g"].gap and gap is not None and gap.value == 0.5


def test_every_fusion_is_compared_with_the_mean_of_features_too() -> None:
    good, bad = says([1] * 8), says([1, 1, 1, 1, 0, 0, 0, 0])
    answers = [
        Answer(REFERENCE, "average", [bad]),
        Answer("g", "gate", [good], val_loss=[1.0]),
        Answer("mean", "average", [good], val_loss=[1.0]),
    ]
    lines = {line.name: line for line in rows(answers, LABELS, Bootstrap(np.arange(8), 200), REFERENCE)}
    ungated = lines["g"].ungated
    assert ungated is not None and ungated.value == 0 and ungated.high == 0, "as good as no gate, whatever the average"
    assert lines[REFERENCE].ungated is None and lines["mean"].ungated is None
    without = rows(answers[:2], LABELS, Bootstrap(np.arange(8), 200), REFERENCE)
    assert all(line.ungated is None for line in without)


def test_shapley_shares_out_the_whole_accuracy() -> None:
    draws = np.random.default_rng(0)
    right = {subset: draws.random(40) for subset in [(), *subsets(3)]}
    values = shapley(right, 3)
    assert np.allclose(values.sum(axis=1), right[0, 1, 2] - right[()])
    worth = np.array([0.1, 0.2, 0.3])
    additive = {subset: np.full(1, worth[list(subset)].sum()) for subset in [(), *subsets(3)]}
    assert np.allclose(shapley(additive, 3), worth), "without interplay each has its own worth"


def test_the_fusion_is_chosen_on_validation_and_not_on_test() -> None:
    lucky = Answer("lucky", "gate", [says([1] * 8)], val_loss=[2.0])
    sober = Answer("sober", "fusion", [says([0] * 8)], val_loss=[1.0])
    assert chosen([lucky, sober, Answer("x", "control", [])]).name == "sober"
    with pytest.raises(ValueError, match="no fusion"):
        chosen([Answer(REFERENCE, "average", [])])


def test_weights_that_differ_by_absence_alone_do_not_vary() -> None:
    present = np.array([[True, True], [True, True], [True, False]])
    constant = np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    assert not gates.varies(constant, present)
    assert gates.varies(constant + np.array([[0.1, -0.1], [0, 0], [0, 0]]), present)


def test_guessing_heads_make_a_lucky_oracle() -> None:
    present = np.array([[True, True], [True, False]])
    assert lucky_oracle(present, 2) == pytest.approx((0.75 + 0.5) / 2)
    draws = np.random.default_rng(1)
    unimodal, labels = draws.normal(size=(20000, 2, 4)), draws.integers(4, size=20000)
    there = np.ones((20000, 2), bool)
    right = gates.oracle(unimodal, there, labels).argmax(axis=1) == labels
    assert right.mean() == pytest.approx(lucky_oracle(there, 4), abs=0.02)
