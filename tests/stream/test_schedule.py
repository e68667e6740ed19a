"""The schedule as arithmetic: exactly once, whoever reads, wherever one starts."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossgate.errors import UserError
from crossgate.stream import schedule
from crossgate.stream.schedule import Schedule, clip_seed, lanes_of

GOLDEN = "5319332112581c7e13869e95b4c93af5665f53797a1bff78d5dae5ce1c5b9f7c"
fixed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

Clips = list[tuple[int, int]]


@pytest.fixture(params=["whole", "lanes"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of mixing: corpora of a few dozen clips count as large in the second."""
    if request.param == "lanes":
        monkeypatch.setattr(schedule, "MIXED", 16)
    return request.param


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make(counts, global_batch: int, **how) -> Schedule:
    return Schedule(np.array(counts), **({"digest": "d", "seed": 1, "epoch": 0, "global_batch": global_batch} | how))


def clips(found: tuple[np.ndarray, np.ndarray]) -> Clips:
    return list(zip(found[0].tolist(), found[1].tolist()))


def epoch_of(plan: Schedule) -> list[Clips]:
    return [clips(plan.batch(step)) for step in range(plan.steps)]


corpora = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=25).filter(sum)


@fixed
@given(counts=corpora, batch=st.integers(1, 48), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_every_clip_exactly_once(regime, counts, batch, seed, epoch) -> None:
    total = sum(counts)
    everything = {(shard, row) for shard, clips in enumerate(counts) for row in range(clips)}
    wrapped = epoch_of(make(counts, batch, seed=seed, epoch=epoch, tail="wrap"))
    flat = [clip for part in wrapped for clip in part]
    assert {len(part) for part in wrapped} == {batch}
    assert set(flat[:total]) == everything
    assert len(wrapped) == -(-total // batch)
    if total >= batch:
        assert flat[total:] == flat[: len(flat) - total], "the tail is filled up from the epoch's start"
        assert all(len(set(part)) == batch for part in wrapped), "no batch holds a clip twice"
        dropped = epoch_of(make(counts, batch, seed=seed, epoch=epoch))
        assert dropped == wrapped[: total // batch]
    else:
        with pytest.raises(UserError, match="data.global_batch"):
            make(counts, batch)


@fixed
@given(counts=corpora, batch=st.sampled_from([1, 6, 8, 12, 16, 48]), data=st.data())
def test_ranks_and_parts_share_the_same_global_batch(regime, counts, batch, data) -> None:
    plan = make(counts, batch, tail="wrap")
    step = data.draw(st.integers(0, plan.steps - 1))
    parts = data.draw(st.sampled_from(divisors(batch)))
    ranks = data.draw(st.sampled_from(divisors(batch // parts)))
    shares = [
        [clips(make(counts, batch, tail="wrap").slots(step, rank, ranks, part, parts)) for rank in range(ranks)]
        for part in range(parts)
    ]
    assert [clip for part in shares for share in part for clip in share] == clips(plan.batch(step))
    one_rank = [clips(plan.slots(step, 0, 1, part, parts)) for part in range(parts)]
    assert [sum(part, []) for part in shares] == one_rank, "what is accumulated together depends on ranks"


@fixed
@given(counts=corpora, batch=st.integers(1, 12), data=st.data())
def test_seeking_is_replaying(regime, counts, batch, data) -> None:
    replayed = epoch_of(make(counts, batch, tail="wrap"))
    step = data.draw(st.integers(0, len(replayed) - 1))
    assert clips(make(counts, batch, tail="wrap").batch(step)) == replayed[step]


def test_each_ingredient_changes_the_order(regime) -> None:
    base = epoch_of(make([30, 30, 30], 6))
    assert base == epoch_of(make([30, 30, 30], 6))
    for change in ({"seed": 2}, {"epoch": 1}, {"digest": "e"}):
        assert base != epoch_of(make([30, 30, 30], 6, **change))


def test_order_is_the_same_in_every_version() -> None:
    """A resumed run must find the order that it left: this digest may change only with STATE_VERSION."""
    text = b""
    for counts, batch in ([7, 0, 5, 20], 8), ([9000, 1, 12_000], 64):
        plan = make(counts, batch, seed=3, epoch=2, tail="wrap")
        text += b"".join(np.stack(plan.batch(step)).astype("<i8").tobytes() for step in range(0, plan.steps, 7))
    assert hashlib.sha256(text).hexdigest() == GOLDEN


def test_small_corpora_are_shuffled_uniformly() -> None:
    """Over many epochs each of 6 clips comes first equally often (chi-square, 5 degrees: 20.5 is p = 0.001)."""
    first = np.zeros(6)
    for epoch in range(600):
        shards, rows = make([2, 4], 1, epoch=epoch).batch(0)
        first[shards[0] * 2 + rows[0]] += 1
    assert ((first - 100) ** 2 / 100).sum() < 20.5


def test_large_corpora_mix_across_shards_and_steps() -> None:
    plan = make(np.full(400, 250), 64)
    shards = [plan.batch(step)[0] for step in range(200)]
    assert np.mean([len(set(part.tolist())) for part in shards]) > 55, "a batch draws from nearly as many shards"
    rows = np.array([plan.slots(step, 3, 64)[1][0] for step in range(100)])
    assert np.abs(np.diff(rows)).mean() > 30, "neighbours in a shard are not neighbours in time"


def test_a_shard_is_read_by_one_rank_but_at_the_borders() -> None:
    plan, ranks = make(np.full(300, 100), 64), 8
    readers: dict[int, set[int]] = {}
    for step in range(plan.steps):
        for rank in range(ranks):
            for shard in plan.slots(step, rank, ranks)[0].tolist():
                readers.setdefault(shard, set()).add(rank)
    assert sum(len(who) - 1 for who in readers.values()) <= ranks


def test_start_is_cheap_for_a_billion_clips() -> None:
    plan = make(np.full(100_000, 10_000), 8192)
    shards, rows = plan.slots(plan.steps - 1, 1023, 1024)
    assert len(shards) == 8
    assert rows.max() < 10_000
    sizes = [value.nbytes for value in vars(plan).values() if isinstance(value, np.ndarray)]
    assert sum(sizes) < 5_000_000


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (64, 64), (1024, 1024), (8192, 1024), (7168, 1024), (2062, 2)])
def test_lanes_divide_the_batch(batch: int, lanes: int) -> None:
    assert lanes_of(batch) == lanes


def test_what_cannot_be_shared_is_refused() -> None:
    plan = make([30], 6)
    with pytest.raises(UserError, match="multiple of 4"):
        plan.slots(0, 0, 4)
    with pytest.raises(IndexError):
        plan.batch(plan.steps)


def test_seed_of_a_clip_is_its_own() -> None:
    seeds = {clip_seed(seed, clip, epoch) for seed in range(5) for clip in range(50) for epoch in range(5)}
    assert len(seeds) == 5 * 50 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)
