"""Small corpora, written by the real writer."""

from __future__ import annotations

from collections.abc import Sequence

from crossgate.stream.index import Index, write_index
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import open_store


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
