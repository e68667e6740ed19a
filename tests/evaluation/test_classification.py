"""Classification scores: the resampled forms equal scikit-learn's, thresholds come from validation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from crossgate.evaluation import classification as c
from crossgate.evaluation.intervals import Bootstrap


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 30), st.integers(0, 10_000))
def test_weighted_ranking_metrics_equal_scikit_learn_on_repeated_rows(n, seed):
    draws = np.random.default_rng(seed)
    scores = draws.integers(0, 6, size=n) / 5  # many ties
    positive = draws.random(n) < 0.5
    counts = draws.integers(0, 4, size=n)
    rows = np.repeat(np.arange(n), counts)
    weights = counts[None].astype(float)
    ap, auc = c.average_precision(scores, positive)(weights)[0], c.roc_auc(scores, positive)(weights)[0]
    if positive[rows].any():
        assert ap == pytest.approx(sk.average_precision_score(positive[rows], scores[rows]), abs=1e-12)
    else:
        assert math.isnan(ap)
    if positive[rows].any() and not positive[rows].all():
        assert auc == pytest.approx(sk.roc_auc_score(positive[rows], scores[rows]), abs=1e-12)
    else:
        assert math.isnan(auc)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(2, 5), st.integers(0, 10_000))
def test_weighted_class_metrics_equal_scikit_learn_on_repeated_rows(n, classes, seed):
    draws = np.random.default_rng(seed)
    labels, predicted = draws.integers(classes, size=(2, n))
    counts = draws.integers(0, 4, size=n)
    rows = np.repeat(np.arange(n), counts)
    weights = counts[None].astype(float)
    if not len(rows):
        assert math.isnan(c.mean_class_accuracy(predicted, labels)(weights)[0])
        return
    truth, said = labels[rows], predicted[rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recall = sk.balanced_accuracy_score(truth, said)
    macro = sk.f1_score(truth, said, labels=np.unique(truth), average="macro", zero_division=0)
    single = sk.f1_score(truth == 0, said == 0, zero_division=0)
    assert c.mean_class_accuracy(predicted, labels)(weights)[0] == pytest.approx(recall)
    assert c.macro_f1(predicted, labels)(weights)[0] == pytest.approx(macro)
    assert c.f1(predicted == 0, labels == 0)(weights)[0] == pytest.approx(single)


def test_multiclass_golden_values():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    labels = np.array([0, 1, 1, 2])
    scores = c.multiclass(probabilities, labels, Bootstrap(np.arange(4), 100))
    assert scores["accuracy"].value == 0.75
    assert scores["mean_class_accuracy"].value == pytest.approx((1 + 0.5 + 1) / 3)
    assert scores["macro_f1"].value == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert scores["nll"].value == pytest.approx(-np.log([0.7, 0.6, 0.3, 0.6]).mean())
    assert "top5_accuracy" not in scores  # trivial for five classes or fewer
    assert math.isnan(scores["ece"].low)


def test_top5_counts_the_five_best():
    probabilities = np.tile(np.arange(8)[None] / 28.0, (3, 1))
    scores = c.multiclass(probabilities, np.array([7, 3, 2]), Bootstrap(np.arange(3), 50))
    assert scores["top5_accuracy"].value == pytest.approx(2 / 3)
    assert scores["top5_accuracy"].value == pytest.approx(
        sk.top_k_accuracy_score([7, 3, 2], probabilities, k=5, labels=np.arange(8))
    )


def test_calibration_error_by_hand():
    probabilities = np.array([[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 6)
    labels = np.array([0, 0, 0, 1] + [1, 1, 1, 0, 0, 0])
    # confidence 0.8, right 3 of 4; confidence 0.6, right 3 of 6
    assert c.expected_calibration_error(probabilities, labels) == pytest.approx(0.4 * 0.05 + 0.6 * 0.1, abs=1e-6)


def test_a_class_missing_in_the_test_split_does_not_count():
    probabilities = np.eye(4)[[0, 1, 3] * 2] * 0.9 + 0.025
    scores = c.multiclass(probabilities, np.array([0, 1, 1] * 2), Bootstrap(np.arange(6), 100))
    assert scores["mean_class_accuracy"].value == pytest.approx(0.75)
    assert 0 <= scores["macro_f1"].low <= scores["macro_f1"].high <= 1


def test_binary_golden_values():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.3, 0.2])
    positive = np.array([True, False, True, True, False, False])
    found = c.binary(scores, positive, c.Thresholds(0.65, 0.75), Bootstrap(np.arange(6), 300))
    assert found["average_precision"].value == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found["roc_auc"].value == pytest.approx(7 / 9)
    assert found["accuracy"].value == pytest.approx(4 / 6)  # 0.9 0.8 0.7 said positive
    assert found["accuracy_argmax"].value == pytest.approx(5 / 6)
    assert found["f1"].value == pytest.approx(2 * 2 / (3 + 3))
    assert found["balanced_accuracy"].value == pytest.approx(2 / 3)
    assert found["fnr_at_fixed_fpr"].value == pytest.approx(2 / 3)  # only 0.9 of three is found at 0.75
    assert found["fpr_at_fixed_fpr"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("positive", [np.zeros(5, dtype=bool), np.ones(5, dtype=bool)])
def test_one_class_only_gives_no_made_up_numbers(positive):
    found = c.binary(np.linspace(0.1, 0.9, 5), positive, c.Thresholds(0.5, 0.5), Bootstrap(np.arange(5), 50))
    assert math.isnan(found["roc_auc"].value)
    assert math.isnan(found["average_precision"].value) == (not positive.any())
    assert math.isfinite(found["accuracy"].value)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0]))
def test_thresholds_against_every_alternative(n, seed, fixed_fpr):
    draws = np.random.default_rng(seed)
    scores = draws.integers(0, 11, size=n) / 10  # 0 and 1 and ties occur
    positive = draws.random(n) < 0.5
    chosen = c.choose_thresholds(scores, positive, fixed_fpr)
    if positive.all() or not positive.any():
        assert chosen == c.Thresholds(0.5, 0.5)
        return

    def rates(threshold):
        said = scores >= threshold
        return said[~positive].mean(), said[positive].mean()

    tries = [rates(t) for t in [*np.unique(scores), 2.0]]
    false_rate, true_rate = rates(chosen.low_alarm)
    assert false_rate <= fixed_fpr
    assert true_rate == max(hit for alarm, hit in tries if alarm <= fixed_fpr)
    false_rate, true_rate = rates(chosen.decision)
    assert true_rate - false_rate == pytest.approx(max(hit - alarm for alarm, hit in tries))


def test_majority_is_that_of_training_where_it_is_known():
    test, train = np.array([0, 0, 0, 1]), np.array([1, 1, 0])
    assert c.chance(test, 4) == {"majority": 0.75, "uniform": 0.25}
    assert c.chance(test, 4, train)["majority"] == 0.25


def test_softmax_survives_large_logits():
    p = c.softmax(np.array([[1e4, 0.0], [-1e4, -1e4]], dtype=np.float32))
    np.testing.assert_allclose(p, [[1, 0], [0.5, 0.5]])
