"""Small corpora, written by the real writer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from crossgate.config import AugmentConfig, ClipConfig, DataConfig
from crossgate.stream.index import Index, write_index
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import Store, open_store

sys.path.insert(0, str(Path(__file__).parent))  # worker processes inherit it and find the stub codec


def write_corpus(url: str, counts: dict[str, Sequence[int]], *, audio: bool = True) -> Index:
    """Writes shards with so many clips per split; clip n holds the number n, every third one has no sound."""
    store, entries, number = open_store(url), [], 0
    for split, shards in counts.items():
        for shard, clips in enumerate(shards):
            with ShardWriter(store, f"{split}-{shard:06d}.tar", split=split) as writer:
                for _ in range(clips):
                    add_clip(writer, number, split, audio=audio and number % 3 != 0)
                    number += 1
            entries.append(writer.entry)
    return write_index(store, entries, settings={"by": "test"})


def add_clip(writer: ShardWriter, number: int, split: str, *, audio: bool | bytes, rgb: bytes | None = None) -> None:
    members = {"rgb.bin": rgb if rgb is not None else str(number).encode()}
    if audio:
        members["audio.bin"] = audio if isinstance(audio, bytes) else str(number).encode()
    record = {
        "group": f"{split}-source-{number // 4}",
        "split": split,
        "labels": {"action": ("run", "sit", "wave")[number % 3]},
        "degraded": {"rgb": 0.25} if number % 2 else {},
    }
    writer.add(f"clip_{number:05d}", members, record)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Index]:
    """``make_corpus({"train": [5, 0, 3]})`` -> index of a new folder."""
    folders = iter(range(1000))
    return lambda counts, **how: write_corpus(str(tmp_path / f"corpus{next(folders)}"), counts, **how)


@pytest.fixture
def settings() -> Callable[..., DataConfig]:
    """Small clips of picture and sound, without workers unless asked for."""

    def make(**changes) -> DataConfig:
        clip = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
        return DataConfig(**({"clip": clip, "augment": AugmentConfig(), "global_batch": 4} | changes))

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))
