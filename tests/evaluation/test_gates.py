"""Gate diagnostics and controls on arrays whose answers are known."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest

from crossgate.evaluation import gates
from crossgate.evaluation.comparison import statistic
from crossgate.evaluation.intervals import Bootstrap

NAMES = ("rgb", "audio")


def logits_for(classes, sure=4.0):
    """(N, M) classes that each head says -> (N, M, K) logits of two classes."""
    return sure * np.eye(2)[np.asarray(classes)]


def test_mean_weights_by_modality_and_class_ignore_absent_modalities():
    weights = np.array([[0.8, 0.2], [0.4, 0.6], [1.0, 99.0], [0.6, 0.4]])
    present = np.array([[1, 1], [1, 1], [1, 0], [1, 1]], dtype=bool)
    labels = np.array([0, 0, 1, 2])
    report = gates.diagnose([weights], present, labels, 4, np.full((4, 2), np.nan), NAMES, Bootstrap(np.arange(4), 50))
    assert report.by_modality["rgb"].value == pytest.approx(0.7)
    assert report.by_modality["audio"].value == pytest.approx(0.4)
    np.testing.assert_allclose(
        report.by_class, [[0.6, 0.4], [1.0, np.nan], [0.6, 0.4], [np.nan, np.nan]], equal_nan=True
    )
    assert report.with_severity == {}  # nothing is known about degradation
    assert report.with_right == {}


def test_entropy_and_collapse_count_only_clips_with_a_choice():
    weights = np.array([[0.5, 0.5], [0.99, 0.01], [1.0, 0.0]])
    present = np.array([[1, 1], [1, 1], [1, 0]], dtype=bool)
    report = gates.diagnose(
        [weights], present, np.zeros(3, int), 1, np.full((3, 2), np.nan), NAMES, Bootstrap(np.arange(3), 50)
    )
    h = -(0.99 * math.log(0.99) + 0.01 * math.log(0.01)) / math.log(2)
    assert report.entropy.value == pytest.approx((1 + h) / 2)
    assert report.collapse.value == 0.5


def test_weight_falls_with_severity():
    draws = np.random.default_rng(0)
    severity = np.where(draws.random((200, 2)) < 0.5, draws.random((200, 2)), 0.0)
    weights, present = np.exp(-2 * severity), np.ones((200, 2), dtype=bool)
    report = gates.diagnose(
        [weights], present, np.zeros(200, int), 1, severity, NAMES, Bootstrap(np.arange(200) // 2, 200)
    )
    for name in NAMES:
        assert report.with_severity[name].high < -0.9
        means = [interval.value for *_, interval in report.by_severity[name]]
        assert len(means) == 4
        assert means == sorted(means, reverse=True)
        assert means[0] == pytest.approx(1.0)  # the first bin holds the clean clips


def test_weight_follows_being_right():
    right = np.array([[1, 0], [0, 1], [1, 1], [0, 0]] * 10, dtype=bool)
    labels = np.zeros(40, int)
    heads = logits_for(np.where(right, 0, 1))
    report = gates.diagnose(
        [right + 0.1],
        np.ones((40, 2), bool),
        labels,
        2,
        np.full((40, 2), np.nan),
        NAMES,
        Bootstrap(np.arange(40), 100),
        [heads],
    )
    assert report.with_right["rgb"].value == pytest.approx(1.0)


def test_seeds_that_each_take_one_modality_are_collapsed_and_not_even():
    seeds, clips = [np.eye(3)[[m] * 20] for m in (0, 1, 2, 0)], np.arange(20)
    unknown = np.full((20, 3), np.nan)
    names = ("rgb", "flow", "audio")
    report = gates.diagnose(seeds, np.ones((20, 3), bool), clips % 2, 2, unknown, names, Bootstrap(clips, 50))
    assert (report.collapse.value, report.collapse.low) == (1.0, 1.0)
    assert report.entropy.value == pytest.approx(0.0, abs=1e-9)
    assert [report.by_modality[name].value for name in names] == [0.5, 0.25, 0.25]
    np.testing.assert_allclose(report.by_class, [[0.5, 0.25, 0.25]] * 2)


def test_correlations_are_those_of_each_seed_with_its_own_heads():
    draws = np.random.default_rng(3)
    rights = [draws.random((60, 2)) < 0.5 for _ in range(3)]  # each seed's heads are right about other clips
    severity = np.where(np.arange(60)[:, None] % 2, draws.random((60, 2)), 0.0)
    seeds = [3 + right - k * severity for k, right in enumerate(rights)]
    heads = [logits_for(np.where(right, 0, 1)) for right in rights]
    heads[0] = 9 * heads[0]  # one seed is so sure that averaged scores would be its own
    there, labels, bootstrap = np.ones((60, 2), bool), np.zeros(60, int), Bootstrap(np.arange(60), 50)
    report = gates.diagnose(seeds, there, labels, 2, severity, NAMES, bootstrap, heads)
    for m, name in enumerate(NAMES):
        by_seed = [np.corrcoef(one[:, m], right[:, m])[0, 1] for one, right in zip(seeds, rights)]
        assert report.with_right[name].value == pytest.approx(np.mean(by_seed))
        by_seed = [np.corrcoef(one[:, m], severity[:, m])[0, 1] for one in seeds]
        assert report.with_severity[name].value == pytest.approx(np.mean(by_seed))
    with pytest.raises(ValueError):
        gates.diagnose(seeds, there, labels, 2, severity, NAMES, bootstrap, heads[:2])


def test_shares_of_sigmoid_gates_sum_to_one_and_survive_all_zero():
    weights = np.array([[0.9, 0.9], [0.0, 0.0], [0.3, 0.9]])
    present = np.array([[1, 1], [1, 1], [1, 0]], dtype=bool)
    np.testing.assert_allclose(gates.shares(weights, present), [[0.5, 0.5], [0.5, 0.5], [1, 0]])


def test_uniform_averages_by_hand_and_absent_heads_change_nothing():
    heads = np.log(np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.5, 0.5]]]))
    present = np.array([[1, 1], [1, 0]], dtype=bool)
    np.testing.assert_allclose(gates.uniform_probabilities(heads, present), [[0.55, 0.45], [0.7, 0.3]])
    geometric = np.sqrt([0.9 * 0.2, 0.1 * 0.8])
    np.testing.assert_allclose(gates.uniform_logits(heads, present), [geometric / geometric.sum(), [0.7, 0.3]])
    before = gates.uniform_probabilities(heads, present)
    heads[1, 1] = np.nan
    np.testing.assert_array_equal(gates.uniform_probabilities(heads, present), before)
    assert np.isfinite(gates.uniform_logits(heads, present)).all()


def test_single_modality_answers_with_the_prior_where_it_is_absent():
    heads, present = logits_for([[0, 1], [1, 1]]), np.array([[1, 1], [0, 1]], dtype=bool)
    answer = gates.single(heads, present, 0, np.array([0.3, 0.7]))
    assert answer[0].argmax() == 0
    np.testing.assert_allclose(answer[1], [0.3, 0.7])


def test_oracle_is_right_exactly_where_a_present_head_is():
    said = np.array(list(itertools.product([0, 1], repeat=2)))
    labels, present = np.zeros(4, int), np.ones((4, 2), dtype=bool)
    answer = gates.oracle(logits_for(said), present, labels)
    np.testing.assert_array_equal(answer.argmax(axis=1), [0, 0, 0, 1])
    present[1, 0] = False  # the only right head is not there
    assert gates.oracle(logits_for(said), present, labels)[1].argmax() == 1


def test_oracle_prefers_a_right_head_to_one_that_gives_the_truth_more_probability():
    probabilities = np.array([[[0.45, 0.55, 0.0], [0.4, 0.3, 0.3]]])
    answer = gates.oracle(np.log(probabilities + 1e-9), np.ones((1, 2), bool), np.array([0]))
    assert answer.argmax() == 0


def test_shuffling_keeps_the_pattern_and_loses_the_match():
    draws = np.random.default_rng(1)
    clips = 300
    present = np.ones((clips, 2), dtype=bool)
    present[::3, 1] = False
    good = draws.integers(2, size=clips)  # which head is right
    good[::3] = 0
    labels = draws.integers(2, size=clips)
    heads = logits_for(np.where(np.arange(2) == good[:, None], labels[:, None], 1 - labels[:, None]))
    weights = np.where(np.arange(2) == good[:, None], 0.9, 0.1)
    matched = gates.mix_probabilities(gates.shares(weights, present), heads).argmax(axis=1)
    mixed = gates.shuffled(weights, heads, present).argmax(axis=1)
    assert (matched == labels).all()
    assert (mixed[::3] == labels[::3]).all(), "clips with one modality have only one possible mix"
    both = present.all(axis=1)
    assert 0.35 < (mixed == labels)[both].mean() < 0.65


def test_fixed_weights_find_the_useful_head_and_stay_even_on_ties():
    labels = np.array([0, 1] * 20)
    heads = logits_for(np.stack([labels, 1 - labels], axis=1))
    present = np.ones((40, 2), dtype=bool)
    accuracy = partial(statistic, "accuracy")
    fixed, reached = gates.fixed_weights(heads, present, labels, accuracy)
    assert fixed[0] > 0.5
    assert reached == 1.0
    same = logits_for(np.stack([labels] * 3, axis=1))
    np.testing.assert_allclose(gates.fixed_weights(same, np.ones((40, 3), bool), labels, accuracy)[0], [1 / 3] * 3)


def test_fixed_weights_are_best_in_what_the_task_is_judged_by():
    labels = np.array([1] * 8 + [0] * 24)
    answers = np.where(labels == 1, 0.9, 0.1)  # right about all but two clips, which it ranks last
    answers[:2] = 0.05
    ranks = np.where(labels == 1, 0.9, 0.85)  # ranks all of them right, and calls every clip positive
    heads = np.log(np.stack([[1 - p, p] for p in (answers, ranks)]).transpose(2, 0, 1))  # (N, 2, 2)
    present = np.ones((32, 2), bool)
    found = {
        metric: gates.fixed_weights(heads, present, labels, partial(statistic, metric, positive=1))
        for metric in ("accuracy", "average_precision")
    }
    np.testing.assert_allclose(found["accuracy"][0], [0.5, 0.5])
    np.testing.assert_allclose(found["average_precision"][0], [0.4, 0.6])
    assert found["accuracy"][1] == 30 / 32 and found["average_precision"][1] == 1.0


def test_fixed_weights_stay_even_where_validation_cannot_tell():
    heads, present = logits_for([[0, 1, 1]] * 6), np.ones((6, 3), bool)
    ranked = partial(statistic, "average_precision", positive=1)
    fixed, reached = gates.fixed_weights(heads, present, np.zeros(6, int), ranked)
    np.testing.assert_allclose(fixed, [1 / 3] * 3)
    assert math.isnan(reached)


def test_mask_only_uses_presence_and_nothing_else():
    labels = np.array([0, 1] * 30)
    telling = np.stack([np.ones(60, bool), labels == 1], axis=1)
    assert (gates.mask_only(telling, labels, telling, 2).argmax(axis=1) == labels).all()
    always = np.ones((60, 2), dtype=bool)
    np.testing.assert_allclose(gates.mask_only(always, labels, always[:3], 2), np.full((3, 2), 0.5))
