"""Retrieval: ranks against a slow loop, ties, siblings, missing modalities, the gallery's limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossgate.evaluation.intervals import Bootstrap
from crossgate.evaluation.retrieval import Retrieval, intervals, ranks, retrieve


def slow_ranks(query, target, group):
    """One clip at a time, by the definition."""
    found = []
    for i in range(len(query)):

        def cosine(j, i=i):
            return query[i] @ target[j] / (np.linalg.norm(query[i]) * np.linalg.norm(target[j]))

        others = [j for j in range(len(query)) if group[j] != group[i]]
        above = sum(cosine(j) > cosine(i) + 1e-9 for j in others)
        equal = sum(abs(cosine(j) - cosine(i)) <= 1e-9 for j in others)
        found.append((1 + above + equal / 2, 1 + len(others)))
    return np.array(found).T


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 25), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10_000))
def test_ranks_equal_the_slow_loop_for_any_tile(clips, per_group, tile, seed):
    draws = np.random.default_rng(seed)
    query, target = draws.integers(-2, 3, size=(2, clips, 3)) + 0.0  # few values: many ties
    query[:, 0] += 0.5  # no zero vectors
    target[:, 0] += 0.5
    group = draws.integers(0, max(1, clips // per_group), size=clips)
    rank, gallery = ranks(query, target, group, tile=tile)
    slow_rank, slow_gallery = slow_ranks(query, target, group)
    np.testing.assert_array_equal(rank, slow_rank)
    np.testing.assert_array_equal(gallery, slow_gallery)


def test_perfect_embeddings_rank_first_and_a_known_swap_second():
    unit = np.eye(5)
    assert (ranks(unit, unit, np.arange(5))[0] == 1).all()
    target = unit.copy()
    target[[0, 1]] = target[[1, 0]]  # clips 0 and 1 point at one another
    rank, _ = ranks(unit, target, np.arange(5))
    # own similarity is 0, one other is at 1, three others tie at 0: 1 + 1 + 3/2
    np.testing.assert_array_equal(rank, [3.5, 3.5, 1, 1, 1])


def test_collapsed_embeddings_score_as_chance_not_as_perfect():
    same = np.ones((21, 4))
    rank, _ = ranks(same, same, np.arange(21))
    assert (rank == 11).all()
    one = Retrieval("rgb", "flow", np.arange(21), rank, np.full(21, 21.0))
    assert one.chance_median == 11


def test_siblings_are_neither_right_nor_wrong():
    query = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    target = np.array([[0.0, 1], [1.0, 0], [0.6, 0.8]])  # clip 0 finds clip 1's target, its sibling
    with_sibling, gallery = ranks(query, target, np.array([4, 4, 5]))
    assert with_sibling[0] == 2  # only clip 2 stands above
    assert gallery.tolist() == [2, 2, 3]
    strangers, _ = ranks(query, target, np.array([4, 6, 5]))
    assert strangers[0] == 3


def test_only_clips_that_have_both_take_part():
    draws = np.random.default_rng(0)
    shared = draws.normal(size=(30, 1, 8))
    embeddings = shared + 0.01 * draws.normal(size=(30, 3, 8))
    present = np.ones((30, 3), dtype=bool)
    present[:10, 1] = False
    present[:, 2] = False  # nobody has the third
    embeddings[~present] = np.nan  # absent rows must not be read
    found = retrieve(embeddings, present, np.arange(30), ("rgb", "flow", "audio"), limit=100)
    assert [one.name for one in found] == ["rgb_to_flow", "flow_to_rgb"]
    assert all((one.rows >= 10).all() and len(one.rows) == 20 for one in found)
    assert all((one.ranks == 1).all() for one in found)


def test_gallery_is_capped_by_a_seeded_draw_common_to_both_directions():
    draws = np.random.default_rng(1)
    embeddings, present = draws.normal(size=(50, 2, 4)), np.ones((50, 2), dtype=bool)
    names = ("rgb", "depth")
    forth, back = retrieve(embeddings, present, np.arange(50), names, limit=20, seed=5)
    assert len(forth.rows) == 20
    assert (forth.gallery == 20).all()
    np.testing.assert_array_equal(forth.rows, back.rows)
    again, _ = retrieve(embeddings, present, np.arange(50), names, limit=20, seed=5)
    other, _ = retrieve(embeddings, present, np.arange(50), names, limit=20, seed=6)
    np.testing.assert_array_equal(forth.rows, again.rows)
    assert (forth.rows != other.rows).any()


def test_recalls_medians_and_chance():
    one = Retrieval("rgb", "flow", np.arange(4), np.array([1.0, 3, 6, 40]), np.full(4, 50.0))
    table = intervals([one], Bootstrap(np.arange(4), 200))
    row = table["rgb_to_flow"]
    assert [row[f"r_at_{k}"].value for k in (1, 5, 10)] == [0.25, 0.5, 0.75]
    assert row["median_rank"].value == 4.5
    assert one.chance_recall(5) == pytest.approx(0.1)
    assert one.chance_recall(100) == 1
    assert table["mean"] == row


def test_random_embeddings_agree_with_chance():
    group, present = np.arange(300) // 3, np.ones((300, 2), dtype=bool)
    recalls, medians, covered = [], [], 0
    for seed in range(20):
        embeddings = np.random.default_rng(seed).normal(size=(300, 2, 16))
        found = retrieve(embeddings, present, group, ("rgb", "flow"), limit=300)
        row = intervals(found, Bootstrap(group, 300))["mean"]
        recalls.append(row["r_at_10"].value)
        medians.append(row["median_rank"].value)
        covered += row["r_at_10"].low <= found[0].chance_recall(10) <= row["r_at_10"].high
    assert np.mean(recalls) == pytest.approx(found[0].chance_recall(10), rel=0.12)
    assert np.mean(medians) == pytest.approx(found[0].chance_median, rel=0.05)
    assert covered >= 15


def test_nothing_to_retrieve():
    assert intervals([], Bootstrap(np.arange(3))) == {}
    assert retrieve(np.ones((1, 2, 3)), np.ones((1, 2), dtype=bool), np.zeros(1), ("rgb", "flow"), 10) == []
