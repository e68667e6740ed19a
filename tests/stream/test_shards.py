"""Writing: plain WebDataset, the same bytes again, whole or not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset
from small_corpora import add_clip

from crossgate.errors import UserError
from crossgate.stream.index import Index, write_index
from crossgate.stream.shards import ShardWriter, finished_shard
from crossgate.stream.sidecar import Sidecar
from crossgate.stream.storage import Store

NAME = "train-000000.tar"


def write(store: Store, name: str = NAME, clips: int = 5, split: str = "train", **how) -> ShardWriter:
    with ShardWriter(store, name, split=split, **how) as writer:
        for number in range(clips):
            add_clip(writer, number, split, audio=number != 0)
    return writer


def test_webdataset_alone_reads_it(store: Store) -> None:
    write(store)
    found = list(webdataset.WebDataset(store.path(NAME), shardshuffle=False).decode())
    assert [clip["__key__"] for clip in found] == [f"clip_{n:05d}" for n in range(5)]
    assert found[1]["rgb.bin"] == b"1"
    assert found[1]["json"]["labels"] == {"action": "sit"}
    assert "audio.bin" not in found[0]


def test_same_clips_give_the_same_bytes(store: Store) -> None:
    first = write(store).entry
    before = Path(store.path(NAME)).read_bytes()
    time.sleep(1.1)  # a tar's clock ticks in seconds
    assert write(store).entry == first
    assert Path(store.path(NAME)).read_bytes() == before


def test_long_and_foreign_names_keep_their_offsets(store: Store) -> None:
    key = "k" * 180
    with ShardWriter(store, NAME, split="train") as writer:
        writer.add(key, {"rgb.bin": b"abc"}, {"group": "größe"})
        writer.add("next", {"rgb.bin": b"defg" * 1000}, {})
    sidecar = Sidecar.load(store, NAME)
    assert sidecar.group_name(0) == "größe"
    for row, content in enumerate((b"abc", b"defg" * 1000)):
        offset, size = sidecar.members(row)["rgb.bin"]
        assert store.read_range(NAME, offset, offset + size) == content
    assert next(iter(webdataset.WebDataset(store.path(NAME), shardshuffle=False)))["__key__"] == key


def test_sidecar_remembers_each_clip(store: Store) -> None:
    write(store)
    record = Sidecar.load(store, NAME).record(1)
    assert (record.key, record.group, record.modalities) == ("clip_00001", "train-source-0", ("rgb", "audio"))
    assert (record.labels, record.degraded) == ({"action": "sit"}, {"rgb": 0.25})
    offset, size = record.members["json"]
    assert json.loads(store.read_range(NAME, offset, offset + size))["group"] == "train-source-0"


def test_finished_shards_are_known_by_name_and_settings(store: Store) -> None:
    assert finished_shard(store, NAME) is None
    entry = write(store, settings="abc").entry
    assert finished_shard(store, NAME) == entry
    assert entry is not None
    assert entry.settings == "abc"
    with open(store.path(NAME), "ab") as file:
        file.write(b"more")
    assert finished_shard(store, NAME) is None, "the tar is not the one that the sidecar was written for"


@pytest.mark.parametrize("key", ["a.b", "", "a/b", "../a", "a b"])
def test_bad_keys_are_refused(store: Store, key: str) -> None:
    with pytest.raises(UserError, match="not usable"), ShardWriter(store, NAME, split="train") as writer:
        writer.add(key, {"rgb.bin": b""}, {})


def test_repeated_keys_and_other_splits_are_refused(store: Store) -> None:
    with ShardWriter(store, NAME, split="train") as writer:
        add_clip(writer, 1, "train", audio=False)
        with pytest.raises(UserError, match="twice"):
            add_clip(writer, 1, "train", audio=False)
        with pytest.raises(UserError, match="split 'val'"):
            add_clip(writer, 2, "val", audio=False)
    assert writer.clips == 1


def test_an_error_inside_the_block_passes_and_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with ShardWriter(store, NAME, split="train") as writer:
            add_clip(writer, 1, "train", audio=False)
            Path("/no/such/video.mp4").read_bytes()

    with pytest.raises(FileNotFoundError):
        fail()
    assert os.listdir(store.url) == []


def test_a_killed_writer_leaves_nothing_visible(store: Store) -> None:
    code = f"""
import time
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import open_store
with ShardWriter(open_store({store.url!r}), {NAME!r}, split="train") as writer:
    writer.add("a", {{"rgb.bin": bytes(1 << 20)}}, {{}})
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(store.url)) == 1
    assert store.list() == []
    assert finished_shard(store, NAME) is None
    store.discard_partials()
    assert os.listdir(store.url) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill() -> None:
        with open("/dev/full", "wb", buffering=0) as full, ShardWriter(store, NAME, split="train") as writer:
            monkeypatch.setattr(writer._file, "_file", full)
            add_clip(writer, 1, "train", audio=False)

    with pytest.raises(UserError, match="no space left") as caught:
        fill()
    assert caught.value.__cause__.errno == errno.ENOSPC  # type: ignore[union-attr]
    assert os.listdir(store.url) == []


def test_index_of_shards_finished_earlier(store: Store) -> None:
    write(store)
    write(store, "val-000000.tar", 3, "val")  # numbers 0..2 again, but other groups
    index = write_index(store, ["val-000000.tar", NAME])
    assert index.names == [NAME, "val-000000.tar"], "canonical order"
    assert Index.load(store.url).digest == index.digest
    with pytest.raises(UserError, match="not finished"):
        write_index(store, ["train-000001.tar"])
