"""check names what is broken."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_corpora import add_clip
from stub_codec import number_tensors

from crossgate.stream import index as module
from crossgate.stream.check import CheckReport, check
from crossgate.stream.index import Index
from crossgate.stream.shards import ShardWriter
from crossgate.stream.sidecar import finished_shard, sidecar_name, write_sidecar

TRAIN = "train-000000.tar"


def found(index: Index, **how) -> list[str]:
    how = {"workers": 1, "decode": number_tensors} | how
    return [str(problem) for problem in check(index.store.url, **how).problems]


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def index(make_corpus) -> Index:
    return make_corpus({"train": [4, 3], "val": [2, 0]})


def test_a_whole_folder_is_whole_in_processes_too(index: Index) -> None:
    done: list[tuple[int, int]] = []
    report = check(index.store.url, workers=2, progress=lambda *c: done.append(c), decode=number_tensors)
    assert report == CheckReport(index.store.url, 4, 9, int(index.bytes.sum()), 9, [])
    assert report.ok
    assert "4 shards, 9 clips (9 decoded)" in report.summary()
    assert done == [(n, 4) for n in range(1, 5)]
    assert check(index.store.url, workers=1, fast=True, decode=number_tensors).decoded == 0


def test_a_changed_byte_is_found_with_shard_and_key(index: Index) -> None:
    offset, _ = index.sidecar(0).members(2)["rgb.bin"]
    patch(index.store.path(TRAIN), offset, b"x")
    digest, decoding = found(index)
    assert digest == f"{TRAIN}: its bytes are not those that were indexed (SHA-256 differs)"
    assert decoding.startswith(f"{TRAIN}, clip clip_00002: cannot be decoded (ValueError")
    assert len(found(index, fast=True)) == 1


def test_a_tar_cut_at_a_member_boundary_is_found(index: Index) -> None:
    path = Path(index.store.path(TRAIN))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-3].offset
    whole = path.read_bytes()
    path.write_bytes(whole[:last])
    assert found(index)[0].startswith(f"{TRAIN}: has {last} bytes, the index says {len(whole)}")
    path.write_bytes(whole[:last].ljust(len(whole), b"\0"))  # a shorter tar of the same length
    assert any("3 clips in the tar, 4 in the sidecar" in problem for problem in found(index))


@pytest.mark.parametrize("name", [TRAIN, sidecar_name(TRAIN)])
def test_a_lost_file_is_named(index: Index, name: str) -> None:
    os.unlink(index.store.path(name))
    assert [problem.startswith(TRAIN) for problem in found(index)] == [True]


def test_damaged_or_swapped_sidecars(index: Index) -> None:
    side = index.store.path(sidecar_name(TRAIN))
    shutil.copy(index.store.path(sidecar_name("train-000001.tar")), side)
    assert any("4 clips in the tar, 3 in the sidecar" in problem for problem in found(index))
    Path(side).write_bytes(b"PAR1")
    assert "sidecar is damaged" in found(index)[0]


def test_labels_and_layout_of_the_sidecar_are_compared(index: Index) -> None:
    records = [index.sidecar(0).record(row) for row in range(4)]
    shard = finished_shard(index.store, TRAIN)
    assert shard is not None
    write_sidecar(index.store, shard, [replace(record, labels={"action": "fly"}) for record in records])
    problems = found(index)
    assert sum("label 'fly' is not in the vocabulary of 'action'" in problem for problem in problems) == 4
    assert sum("the tar and its sidecar disagree" in problem for problem in problems) == 4
    places = [{suffix: (offset + 512, size) for suffix, (offset, size) in r.members.items()} for r in records]
    shifted = [replace(record, members=members) for record, members in zip(records, places)]
    write_sidecar(index.store, shard, shifted)
    assert f"{TRAIN}: its sidecar is not the one that was indexed" in found(index)


def test_strays_repeated_keys_and_groups_in_two_splits(index: Index) -> None:
    with ShardWriter(index.store, "val-000009.tar", split="val") as writer:
        add_clip(writer, 1, "val", audio=True)
        writer.add("other", {"rgb.bin": b"1"}, {"group": "train-source-0", "labels": {"action": "run"}})
    assert found(index) == ["val-000009.tar: is not in the index"]
    entries = [writer.entry] + [finished_shard(index.store, name) for name in index.names]
    table = module.shard_table(sorted(entries, key=lambda entry: entry.name))  # as a careless writer would
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    index.store.put("shards.parquet", buffer.getvalue())
    index.store.put("index.json", json.dumps(index.header | {"digest": module.shards_digest(table)}).encode())
    assert found(index) == [
        "val-000009.tar: group 'train-source-0' is in splits 'train' and 'val'",
        "val-000009.tar, clip clip_00001: this key is also in train-000000.tar",
    ]


def test_a_disk_that_cannot_be_read_is_a_problem_of_that_shard(index: Index) -> None:
    os.unlink(index.store.path("train-000001.tar"))
    os.symlink("/proc/self/mem", index.store.path("train-000001.tar"))  # opens, and fails when read
    assert found(index, fast=True) == ["train-000001.tar: cannot be read (Invalid argument)"]
