"""The real codec through shards, loader and check: pictures, flow, sound and depth; and a plain video with sound."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crossgate.clips.codec import CODECS
from crossgate.clips.tensors import clip_tensors
from crossgate.config import ClipConfig, DataConfig
from crossgate.modality import MODALITIES
from crossgate.stream.check import check
from crossgate.stream.foreign import index_foreign
from crossgate.stream.index import Index, write_index
from crossgate.stream.loader import ClipLoader, sequential
from crossgate.stream.reader import read_clips
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import open_store

FRAMES, SIDE, FPS = 6, 32, 6.0
CLIP = ClipConfig(frames=2, size=32, seconds=1.0, mels=16)


def streams(number: int) -> dict[str, NDArray]:
    rng = np.random.default_rng(number)
    tone = np.sin(np.arange(16_000) * (0.05 + 0.01 * number))
    return {
        "rgb": np.full((FRAMES, SIDE, SIDE, 3), 20 * number, np.uint8),
        "flow": rng.normal(0, 0.1, (FRAMES, SIDE, SIDE, 2)).astype(np.float16),
        "audio": (0.3 * tone).astype(np.float32),
        "depth": np.full((FRAMES, SIDE, SIDE), 1000 + number, np.uint16),
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Eight clips in two shards; clip n lacks modality n % 5."""
    store, entries = open_store(str(tmp_path_factory.mktemp("real"))), []
    for shard in range(2):
        with ShardWriter(store, f"train-{shard:06d}.tar", split="train") as writer:
            for number in range(shard * 4, shard * 4 + 4):
                kept = {m: x for i, (m, x) in enumerate(streams(number).items()) if i != number % 5}
                members = {CODECS[m].suffix: CODECS[m].encode(x, FPS) for m, x in kept.items()}
                record = {"group": f"g{number}", "frames": FRAMES, "fps": FPS, "seconds": FRAMES / FPS}
                writer.add(f"clip{number}", members, record)
        entries.append(writer.entry)
    return write_index(store, entries)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_modalities_arrive_where_they_are_present(index: Index, workers: int) -> None:
    data = DataConfig(clip=CLIP, global_batch=4, loader_workers=workers)
    batches = [batch for _, batch in zip(range(2), ClipLoader(index, ["train"], data, seed=0))]
    for batch in batches:
        expected = [[i != number % 5 for i in range(4)] for number in batch.clip.tolist()]
        assert batch.present.tolist() == expected
        assert all(batch.streams[m].shape == (4, *CLIP.shape(m)) for m in MODALITIES)
        assert all((batch.streams[m][~batch.present[:, i]] == 0).all() for i, m in enumerate(MODALITIES))
    assert sorted(n for batch in batches for n in batch.clip.tolist()) == list(range(8))


def test_a_row_is_what_the_codec_makes_of_the_members(index: Index) -> None:
    [batch] = sequential(index, ["train"], DataConfig(clip=CLIP), batch_size=8)
    raw = read_clips(index, index.select(["train"]), np.arange(8))
    for row, members in enumerate(raw):
        tensors = clip_tensors(members, CLIP)
        assert set(tensors) == {m for i, m in enumerate(MODALITIES) if batch.present[row, i]}
        assert all(torch.equal(batch.streams[m][row], x) for m, x in tensors.items())


def test_members_of_other_modalities_are_not_read(index: Index) -> None:
    loader = ClipLoader(index, ["train"], DataConfig(clip=CLIP, global_batch=8), seed=0)
    lean_clip = CLIP.model_copy(update={"modalities": ("rgb", "depth")})
    lean = ClipLoader(index, ["train"], DataConfig(clip=lean_clip, global_batch=8), seed=0)
    next(iter(loader))
    next(iter(lean))
    assert lean.meters()["data/read_bytes"] < 0.5 * loader.meters()["data/read_bytes"]


def test_check_decodes_every_clip(index: Index) -> None:
    report = check(index.store.url, workers=1)
    assert (report.problems, report.decoded) == ([], 8)


def test_check_names_a_clip_whose_video_is_broken(index: Index, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with ShardWriter(store, "train-000000.tar", split="train") as writer:
        whole = read_clips(index, index.select(["train"]), np.array([0]))[0]
        del whole["json"]
        writer.add("whole", whole, {"frames": FRAMES, "fps": FPS})
        writer.add("broken", {CODECS["rgb"].suffix: b"no video"}, {"frames": 6, "fps": FPS})
    write_index(store, [writer.entry])
    [problem] = check(store.url, workers=1).problems
    assert (problem.shard, problem.key) == ("train-000000.tar", "broken")


def plain_video(number: int, sound: bool) -> bytes:
    """An ``mp4`` as a downloader makes them."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target:
        video = target.add_stream("libx264", rate=12)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = target.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for i in range(12):
            picture = np.full((64, 64, 3), 30 * number, np.uint8)
            picture[:, 4 * i : 4 * i + 8] = 255
            target.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(video.encode(None))
        if audio is not None:
            tone = (8000 * np.sin(np.arange(16_000) * 0.1)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = 16_000
            target.mux(audio.encode(frame))
            target.mux(audio.encode(None))
    return file.getvalue()


def test_plain_videos_of_others_are_streamed(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i:09d}", "mp4": plain_video(i, sound=i % 2 == 0), "json": {"key": f"{i:09d}"}})
    index = index_foreign(str(tmp_path))
    clip = CLIP.model_copy(update={"modalities": ("rgb", "flow", "audio")})
    [batch] = sequential(index, ["train"], DataConfig(clip=clip), batch_size=8)
    assert batch.present.tolist() == [[True, True, i % 2 == 0] for i in range(4)]
    assert batch.streams["flow"].abs().amax() > 0.01
    assert check(str(tmp_path), workers=1).ok
