"""Intervals: they resample groups, cover the truth, and say when they cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossgate.evaluation.intervals import Bootstrap, Interval, correlation, mean, median, over_runs, over_seeds


def test_weights_repeat_whole_groups():
    group = np.array([7, 7, 3, 3, 3, 9])
    for weights in Bootstrap(group, resamples=50).weights():
        assert (weights[:, 0] == weights[:, 1]).all()
        assert (weights[:, 2] == weights[:, 3]).all()
        assert (weights[:, [0, 2, 5]].sum(axis=1) == 3).all()  # as many draws as there are groups


def test_blocks_add_up_to_all_resamples():
    group = np.arange(9000)
    blocks = list(Bootstrap(group, resamples=1000).weights())
    assert len(blocks) > 1
    assert sum(len(block) for block in blocks) == 1000


def test_same_seed_same_interval_whatever_was_computed_before():
    group, values = np.arange(40) // 3, np.random.default_rng(0).random(40)
    first = Bootstrap(group, 200, seed=3)
    first.interval(median(values))
    assert first.interval(mean(values)) == Bootstrap(group, 200, seed=3).interval(mean(values))
    assert first.interval(mean(values)) != Bootstrap(group, 200, seed=4).interval(mean(values))


def test_group_intervals_are_wider_than_those_of_clips_when_siblings_agree():
    draws = np.random.default_rng(1)
    group = np.arange(400) // 10
    values = draws.random(40)[group]  # every clip of a group says the same
    by_group = Bootstrap(group, 500).interval(mean(values))
    by_clip = Bootstrap(np.arange(400), 500).interval(mean(values))
    assert by_group.high - by_group.low > 2 * (by_clip.high - by_clip.low)
    assert (by_group.groups, by_group.clips) == (40, 400)


def test_intervals_cover_the_truth_about_as_often_as_promised():
    draws = np.random.default_rng(2)
    truth, hits, runs = 0.6, 0, 200
    for run in range(runs):
        chance = np.clip(draws.normal(truth, 0.15, size=50), 0, 1)  # groups differ
        group = np.arange(250) // 5
        right = draws.random(250) < chance[group]
        one = Bootstrap(group, 300, seed=run).interval(mean(right))
        hits += one.low <= truth <= one.high
    assert 0.88 <= hits / runs <= 0.99


def test_paired_difference_is_sharper_than_two_intervals():
    draws = np.random.default_rng(3)
    hard = draws.random(300)  # both models fail on the same clips
    first, second = (hard + 0.03 * draws.normal(size=300) < level for level in (0.70, 0.64))
    bootstrap = Bootstrap(np.arange(300) // 3, 1000)
    a, b = bootstrap.interval(mean(first)), bootstrap.interval(mean(second))
    difference = bootstrap.difference(mean(first), mean(second))
    assert difference.value == pytest.approx(a.value - b.value)
    assert a.low < b.high, "the separate intervals overlap"
    assert difference.low > 0
    assert difference.p < 0.01


def test_a_handful_of_groups_has_no_interval():
    values = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    for groups in range(1, 7):
        one = Bootstrap(np.arange(6) % groups, 200).interval(mean(values))
        assert math.isnan(one.low) == (groups < 5), groups
        assert one.value == pytest.approx(4 / 6)


def test_p_value_of_equals_is_one_and_symmetric():
    values = np.random.default_rng(4).random(60) < 0.5
    other = np.random.default_rng(5).random(60) < 0.5
    bootstrap = Bootstrap(np.arange(60), 400)
    assert bootstrap.difference(mean(values), mean(values)).p == 1.0
    forward = bootstrap.difference(mean(values), mean(other))
    backward = bootstrap.difference(mean(other), mean(values))
    assert forward.p == backward.p
    assert forward.low == pytest.approx(-backward.high)


def test_p_values_under_the_null_are_about_uniform():
    draws = np.random.default_rng(6)
    small = 0
    for run in range(200):
        a, b = draws.random((2, 120)) < 0.5
        small += Bootstrap(np.arange(120) // 2, 200, seed=run).difference(mean(a), mean(b)).p < 0.1
    assert 0.04 <= small / 200 <= 0.2


@pytest.mark.parametrize("clips", [0, 1, 5])
def test_one_group_gives_a_value_without_interval(clips):
    one = Bootstrap(np.zeros(clips, dtype=int), 100).interval(mean(np.ones(clips)))
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(one.value) if clips == 0 else one.value == 1.0
    assert set(one.metrics("x")) == {"x"}


def test_undefined_resamples_are_dropped_and_counted():
    values = np.array([0.2, np.nan, np.nan, np.nan, np.nan])  # most resamples of five groups miss the first at times
    one = Bootstrap(np.arange(5), 1000).interval(mean(values))
    assert one.value == pytest.approx(0.2)
    assert 200 < one.dropped < 450  # (4/5)^5 = 33 % lack it
    assert [one.low, one.high] == pytest.approx([0.2, 0.2])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_vectorised_statistics_equal_the_plain_ones_on_repeated_rows(data):
    n = data.draw(st.integers(1, 12))
    numbers = st.floats(-5, 5, allow_subnormal=False).map(lambda x: round(x, 3))
    x, y = (np.array(data.draw(st.lists(numbers, min_size=n, max_size=n))) for _ in range(2))
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    rows = np.repeat(np.arange(n), counts)
    weights = counts[None].astype(float)
    if not len(rows):
        assert np.isnan(mean(x)(weights)[0])
        assert np.isnan(median(x)(weights)[0])
        return
    assert mean(x)(weights)[0] == pytest.approx(x[rows].mean(), abs=1e-12)
    assert median(x)(weights)[0] == pytest.approx(np.median(x[rows]))
    if x[rows].std() > 1e-3 and y[rows].std() > 1e-3:
        assert correlation(x, y)(weights)[0] == pytest.approx(np.corrcoef(x[rows], y[rows])[0, 1], abs=1e-6)
    elif x[rows].std() == 0:
        assert np.isnan(correlation(x, y)(weights)[0])


def test_correlation_leaves_out_unknown_pairs():
    x = np.array([1.0, 2, 3, np.nan, 5])
    y = np.array([2.0, 4, 6, 1, np.nan])
    assert correlation(x, y)(np.ones((1, 5)))[0] == pytest.approx(1.0)
    assert np.isnan(correlation(x, np.full(5, np.nan))(np.ones((1, 5)))[0])


def test_a_few_runs_have_students_interval():
    found = over_runs(np.array([4.0, 6.0, 5.0, 7.0, 3.0]))
    # mean 5, deviation sqrt(2.5), t(0.975, 4) = 2.776445 from a printed table
    assert found.value == 5
    assert (found.low, found.high) == pytest.approx((5 - 2.776445 * 0.5**0.5, 5 + 2.776445 * 0.5**0.5), abs=1e-5)
    assert np.isnan(over_runs(np.array([4.0])).low)


def test_several_seeds_resample_together():
    x, bootstrap = np.arange(8) % 2, Bootstrap(np.arange(8), 50)
    assert np.allclose(bootstrap.distribution(over_seeds([mean(x), mean(1 - x)])), 0.5)


def test_a_seed_without_a_value_leaves_the_others():
    x, constant, everyone = np.arange(8.0), np.ones(8), np.ones((1, 8))
    assert over_seeds([correlation(x, x), correlation(constant, x), correlation(x, -x)])(everyone)[0] == 0
    assert np.isnan(over_seeds([correlation(constant, x)])(everyone)[0])


def test_only_an_interval_on_one_side_excludes_zero():
    ends = {(0.1, 0.2): True, (-0.2, -0.1): True, (-0.1, 0.1): False, (math.nan, math.nan): False}
    for (low, high), apart in ends.items():
        assert Interval(0.0, low, high, 9, 9).excludes_zero is apart
