"""The real loader, its processes included: exactly once, the same for any ranks and workers, resumable anywhere."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_files import opened
from small_corpora import add_clip, write_corpus
from stub_codec import deadly_tensors, interrupted_tensors, number_tensors

from crossgate.batch import ClipBatch
from crossgate.config import AugmentConfig, ClipConfig, DataConfig
from crossgate.errors import Passing, UserError
from crossgate.stream import reader, schedule
from crossgate.stream.collate import BadClip
from crossgate.stream.index import Index, write_index
from crossgate.stream.loader import ClipLoader, sequential
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import open_store

CLIP = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
COUNTS = {"train": [5, 0, 7, 13, 1, 4], "val": [6, 3]}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_corpus(str(tmp_path_factory.mktemp("corpus")), COUNTS)


def make(index: Index, *, rank=0, ranks=1, micro_batch=None, seed=1, decode=number_tensors, **data) -> ClipLoader:
    config = DataConfig(**({"clip": CLIP, "global_batch": 12} | data))
    return ClipLoader(
        index, ["train"], config, seed=seed, rank=rank, ranks=ranks, micro_batch=micro_batch, decode=decode
    )


def take(loader: ClipLoader, batches: int) -> list[ClipBatch]:
    found = iter(loader)
    taken = [next(found) for _ in range(batches)]
    found.close()  # type: ignore[attr-defined]
    return taken


def same(a: ClipBatch, b: ClipBatch) -> bool:
    """Every tensor is equal, decoded and augmented pictures included."""
    pairs = [(a.present, b.present), (a.group, b.group), (a.clip, b.clip)]
    pairs += [(a.streams[m], b.streams[m]) for m in a.modalities]
    pairs += [(a.labels[t], b.labels[t]) for t in a.labels]
    return a.keys == b.keys and all(torch.equal(x, y) for x, y in pairs)


def joined(parts: list[ClipBatch]) -> ClipBatch:
    """What several ranks hold together."""
    return ClipBatch(
        modalities=parts[0].modalities,
        streams={m: torch.cat([p.streams[m] for p in parts]) for m in parts[0].modalities},
        present=torch.cat([p.present for p in parts]),
        group=torch.cat([p.group for p in parts]),
        labels={t: torch.cat([p.labels[t] for p in parts]) for t in parts[0].labels},
        degraded=torch.cat([p.degraded for p in parts]),
        clip=torch.cat([p.clip for p in parts]),
        keys=[key for p in parts for key in p.keys],
    )


def test_a_batch_says_what_the_clips_are(index: Index) -> None:
    batch = take(make(index, augment=AugmentConfig(enabled=False)), 1)[0]
    assert batch.modalities == ("rgb", "audio")
    assert batch.streams["rgb"].shape == (12, *CLIP.shape("rgb"))
    assert batch.streams["rgb"].dtype == torch.uint8
    assert batch.streams["audio"].dtype == torch.float32
    for row, number in enumerate(batch.clip.tolist()):
        assert batch.keys[row] == f"clip_{number:05d}"
        assert (batch.streams["rgb"][row] == number).all()
        assert batch.present[row].tolist() == [True, number % 3 != 0]
        assert (batch.streams["audio"][row] == (number if number % 3 else 0)).all()
        assert batch.labels["action"][row] == number % 3
        assert torch.isnan(batch.degraded[row, 1])
        assert batch.degraded[row, 0] == 0.25 or number % 2 == 0


@pytest.mark.parametrize("tail", ["drop", "wrap"])
def test_every_clip_once_an_epoch(index: Index, tail: str) -> None:
    loader = make(index, tail=tail)
    assert loader.steps_per_epoch == (2 if tail == "drop" else 3)
    for _ in range(2):
        seen = [clip for batch in take(loader, loader.steps_per_epoch) for clip in batch.clip.tolist()]
        if tail == "drop":
            assert len(set(seen)) == len(seen) == 24
        else:
            assert set(seen) == set(range(30))
            assert len(set(seen[:30])) == 30


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("mixed", [8, schedule.MIXED])
def test_stops_and_restarts_with_changed_ranks(index: Index, mixed: int, data: st.DataObject, monkeypatch) -> None:
    """Legs of an epoch and a half, each with its own ranks and micro-batches, against one undisturbed run."""
    monkeypatch.setattr(schedule, "MIXED", mixed)
    undisturbed = take(make(index, tail="wrap"), 5)
    state, at = make(index, tail="wrap").state_dict(), 0
    while at < 5:
        ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12]), label="ranks")
        steps = data.draw(st.integers(1, 5 - at), label="steps")
        loaders = [make(index, tail="wrap", rank=rank, ranks=ranks) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        shares = [take(loader, steps) for loader in loaders]
        for step in range(steps):
            assert same(joined([share[step] for share in shares]), undisturbed[at + step])
        states = [loader.state_dict() for loader in loaders]
        assert all(each == states[0] for each in states)
        state, at = states[0], at + steps


def test_worker_processes_change_nothing(index: Index) -> None:
    expected = take(make(index, tail="wrap"), 7)
    for workers in (1, 2):
        loader = make(index, tail="wrap", loader_workers=workers, prefetch=2)
        assert all(same(a, b) for a, b in zip(take(loader, 3), expected))
        state = loader.state_dict()
        assert (state["epoch"], state["step"]) == (1, 0), "counted is what was handed over, not what was prefetched"
        later = make(index, tail="wrap", rank=1, ranks=2, loader_workers=2)
        later.load_state_dict(state)
        halves = take(later, 4)
        assert [half.clip.tolist() for half in halves] == [whole.clip.tolist()[6:] for whole in expected[3:]]


def test_state_in_the_middle_of_an_epoch_is_small_and_checked(index: Index) -> None:
    loader = make(index, global_batch=6)
    take(loader, 7)
    state = loader.state_dict()
    assert (state["version"], state["epoch"], state["step"]) == (1, 1, 2)
    assert len(repr(state)) < 400
    for change, word in (({"seed": 9}, "seed"), ({"global_batch": 3}, "global_batch"), ({"tail": "wrap"}, "tail")):
        with pytest.raises(UserError, match=f"cannot resume: {word}"):
            make(index, **({"global_batch": 6} | change)).load_state_dict(state)
    with pytest.raises(UserError, match="version 2"):
        loader.load_state_dict(state | {"version": 2})


def test_micro_batches_hold_the_same_clips_for_any_ranks(index: Index) -> None:
    whole = take(make(index), 2)
    two = [take(make(index, rank=rank, ranks=2, micro_batch=3), 4) for rank in range(2)]
    one = take(make(index, micro_batch=6), 4)
    assert all(same(joined([two[0][i], two[1][i]]), one[i]) for i in range(4))
    assert all(same(joined(one[2 * step : 2 * step + 2]), whole[step]) for step in range(2))


def test_a_step_half_handed_over_is_not_counted(index: Index) -> None:
    loader = make(index, micro_batch=6)
    take(loader, 3)
    assert loader.state_dict()["step"] == 1
    assert same(take(loader, 1)[0], take(make(index, micro_batch=6), 3)[2])


def test_augmentation_is_the_clips_and_the_epochs(index: Index) -> None:
    def pictures(loader: ClipLoader, batches: int) -> dict[int, bytes]:
        found = take(loader, batches)
        return {c: b.streams["rgb"][i].numpy().tobytes() for b in found for i, c in enumerate(b.clip.tolist())}

    whole, single = pictures(make(index), 2), pictures(make(index, global_batch=1), 30)
    assert all(single[clip] == picture for clip, picture in whole.items()), "the batch size has no part in it"
    loader = make(index, global_batch=1)
    assert pictures(loader, 30) != pictures(loader, 30), "another epoch, other augmentation"
    assert pictures(make(index, global_batch=1, seed=2), 30) != single


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 4])
def test_sequential_gives_every_clip_once_in_order(index: Index, workers: int, ranks: int) -> None:
    config = DataConfig(clip=CLIP, loader_workers=workers if ranks == 1 else 0)
    found = [
        list(sequential(index, ["val"], config, batch_size=4, rank=r, ranks=ranks, decode=number_tensors))
        for r in range(ranks)
    ]
    flat = [batch for rank in found for batch in rank]
    assert [clip for batch in flat for clip in batch.clip.tolist()] == list(range(30, 39))
    assert [len(batch) for batch in flat] == ([4, 4, 1] if ranks == 1 else [2, 2, 2, 3])
    assert all((batch.streams["rgb"][:, ..., 0] == batch.clip[:, None, None, None] % 251).all() for batch in flat)


def test_sequential_with_a_limit_reaches_every_shard(index: Index) -> None:
    config = DataConfig(clip=CLIP)
    found = [
        clip
        for rank in range(2)
        for batch in sequential(
            index, ["train"], config, batch_size=4, rank=rank, ranks=2, limit=10, decode=number_tensors
        )
        for clip in batch.clip.tolist()
    ]
    assert found == list(range(0, 30, 3))


def test_sequential_takes_a_split_without_one_of_the_modalities(index: Index) -> None:
    config = DataConfig(clip=CLIP.model_copy(update={"modalities": ("rgb", "depth")}))
    batches = list(sequential(index, ["val"], config, batch_size=9, decode=number_tensors))
    assert [len(batch) for batch in batches] == [9]
    assert batches[0].present[:, 0].all()
    assert not batches[0].present[:, 1].any()


# ---- bad clips ---------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(tmp_path: Path) -> Index:
    """Twelve clips, of which 3 and 7 cannot be decoded."""
    store = open_store(str(tmp_path / "spoilt"))
    with ShardWriter(store, "train-000000.tar", split="train") as writer:
        for number in range(12):
            audio = b"noise" if number == 7 else True
            add_clip(writer, number, "train", audio=audio, rgb=b"noise" if number == 3 else None)
    return write_index(store, [writer.entry])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_is_named_counted_and_skipped(spoilt: Index, workers: int, caplog) -> None:
    loader = make(spoilt, global_batch=4, loader_workers=workers)
    for batch in take(loader, 6):  # two epochs: each bad clip counts once
        assert len(batch) == 4
        bad = torch.isin(batch.clip, torch.tensor([3, 7]))
        assert not batch.present[bad].any()
        assert (batch.labels["action"][bad] == -1).all()
        assert all((stream[bad] == 0).all() for stream in batch.streams.values())
        assert batch.present[~bad].all()
    assert sorted(bad.key for bad in loader.bad_clips) == ["clip_00003", "clip_00007"]
    assert loader.meters()["data/bad_clips"] == 2
    assert "clip 'clip_00003' of train-000000.tar: ValueError" in caplog.text


def test_sequential_hands_over_what_it_skipped(spoilt: Index) -> None:
    skipped: list[BadClip] = []
    list(sequential(spoilt, ["train"], DataConfig(clip=CLIP), batch_size=5, decode=number_tensors, skipped=skipped))
    assert [bad.key for bad in skipped] == ["clip_00003", "clip_00007"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_clips_stop_the_run(spoilt: Index, workers: int) -> None:
    with pytest.raises(UserError, match=r"data.max_bad_clips: more than 1 clips cannot be used, clip .* for one"):
        take(make(spoilt, global_batch=12, max_bad_clips=1, loader_workers=workers), 1)


def test_a_clip_of_wrong_shape_is_bad_as_a_whole(index: Index) -> None:
    def decode(members, clip, augment, seed):
        return {"rgb": torch.full(clip.shape("rgb"), 9, dtype=torch.uint8), "audio": torch.zeros(1, 1, 8, 33)}

    loader = make(index, decode=decode)
    [batch] = take(loader, 1)
    assert not batch.present.any()
    assert (batch.streams["rgb"] == 0).all()
    assert "audio decodes to (1, 1, 8, 33), expected (1, 1, 8, 32)" in loader.bad_clips[0].reason


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changed_stops_the_run_with_its_name(spoilt: Index, workers: int) -> None:
    os.truncate(spoilt.store.path("train-000000.tar"), 2048)
    with pytest.raises(UserError, match="train-000000.tar: the shard changed since it was indexed") as caught:
        take(make(spoilt, global_batch=4, loader_workers=workers), 1)
    assert "Traceback" not in str(caught.value)


def test_a_killed_worker_is_one_line_and_no_wait(index: Index) -> None:
    with pytest.raises(Passing, match="data.loader_workers: a decoding process died"):
        take(make(index, tail="wrap", loader_workers=2, decode=deadly_tensors), 3)


def test_ctrl_c_is_left_to_the_trainer(index: Index) -> None:
    parts = take(make(index, tail="wrap", loader_workers=2, decode=interrupted_tensors), 3)
    assert all(map(same, parts, take(make(index, tail="wrap"), 3)))


def test_a_lost_shard_is_named(spoilt: Index) -> None:
    os.unlink(spoilt.store.path("train-000000.tar"))
    with pytest.raises(UserError, match="train-000000.tar"):
        take(make(spoilt, global_batch=4), 1)


def test_wishes_that_cannot_be_met(index: Index) -> None:
    with pytest.raises(UserError, match="modality 'depth'"):
        make(index, clip=CLIP.model_copy(update={"modalities": ("rgb", "depth")}))
    with pytest.raises(UserError, match="30 clips do not fill one global batch of 31"):
        make(index, global_batch=31)
    with pytest.raises(UserError, match="cannot be shared by 5 ranks"):
        make(index, ranks=5)
    with pytest.raises(UserError, match="micro-batches of 5"):
        make(index, micro_batch=5)


def test_meters_say_how_far_ahead_the_workers_are_and_how_fast_bytes_come(index: Index) -> None:
    loader = make(index, tail="wrap", loader_workers=2, prefetch=3)
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 120
    while (depth := loader.meters()["data/queue_depth"]) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
        next(batches)
    assert depth == 6, "two workers hold three decoded batches each while the trainer computes"
    for _ in range(20):
        next(batches)
    meters = loader.meters()
    assert meters["data/queue_depth"] < 6 and meters["data/read_mb_per_s"] > 0 == meters["data/cache_mb_per_s"]
    assert loader.meters()["data/read_mb_per_s"] == 0, "since the last call"
    batches.close()  # type: ignore[attr-defined]
    alone = make(index)
    take(alone, 2)
    assert alone.meters()["data/queue_depth"] == 0


def test_files_do_not_pile_up(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_FILES", 2)
    loader = make(index)
    batches = iter(loader)
    next(batches)
    assert 0 < opened()["tar"] <= 2
    batches.close()  # type: ignore[attr-defined]
    take(loader, 4)
    before = opened()["tar"]
    for _ in range(5):
        take(loader, 2)
    assert opened()["tar"] <= before


def test_the_trainers_random_numbers_are_left_alone(index: Index) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take(make(index), 2)
    assert torch.equal(torch.rand(3), expected)


def test_threads_that_read_local_shards_beside_a_remote_corpus_share_the_open_files(index: Index, monkeypatch) -> None:
    """Only so many files stay open: the one that a thread is about to read is not the one that another closes."""
    pread = os.pread

    def slow(file: int, size: int, start: int) -> bytes:
        time.sleep(0.002)
        return pread(file, size, start)

    monkeypatch.setattr(reader, "_FILES", 1)
    monkeypatch.setattr(os, "pread", slow)
    shared = reader.ClipReader(index, CLIP.modalities)
    places = [(shard, row) for shard, clips in enumerate(index.clips.tolist()) for row in range(clips)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: shared.fetch(*np.array([place]).T)[0], places * 2))
    assert [clip.members["rgb.bin"] for clip in found] == [str(n).encode() for n in range(len(places))] * 2
    assert len(shared._files) == 1
