"""What shards hold together, and the numbers that several have, in memory that does not grow."""

from __future__ import annotations

import errno
import tempfile

import numpy as np
import pytest

from crossgate.errors import UserError
from crossgate.stream.index import write_index
from crossgate.stream.shared import SharedNumbers
from crossgate.stream.sidecar import group_hash
from crossgate.stream.survey import side_by_side


@pytest.mark.parametrize("limit", [10, 100_000])
def test_in_memory_and_in_files_the_same_is_found(limit: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    draw = np.random.default_rng(0)
    pool = np.array([group_hash(f"{n}") for n in range(400)], np.int64)
    given = {shard: draw.choice(pool, 40) for shard in draw.permutation(25).tolist()}
    collected = SharedNumbers(limit)
    for shard, numbers in given.items():
        collected.add(shard, numbers)
    assert bool(list(tmp_path.iterdir())) == (limit == 10)
    found = {}
    for numbers, shards, firsts in collected.occurrences():
        assert not found.keys() & {(int(n), int(s)) for n, s in zip(numbers, shards)}
        found |= {(int(n), int(s)): int(f) for n, s, f in zip(numbers, shards, firsts)}
    owners = {int(n): sorted(s for s in given if n in given[s]) for n in np.concatenate([*given.values()])}
    assert found == {(number, shard): own[0] for number, own in owners.items() for shard in own}
    assert not list(tmp_path.iterdir()), "the files are gone"


def test_nothing_collected() -> None:
    assert list(SharedNumbers().occurrences()) == []


def test_a_full_disk_is_one_line(monkeypatch) -> None:
    def full(*_args, **_how):
        raise OSError(errno.ENOSPC, "no space left on device")

    collected = SharedNumbers(limit=1)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(
        UserError, match=r"no temporary files can be written \(no space left .*free some space, or .*TMPDIR"
    ):
        collected.add(0, np.arange(5))


@pytest.mark.parametrize("at_once", [2, 256])
def test_groups_are_counted_once_a_split(at_once: int, make_corpus, monkeypatch) -> None:
    index = make_corpus({"train": [9, 0, 9, 9], "val": [7]})  # four neighbours share a group, across shards too
    monkeypatch.setattr("crossgate.stream.survey._AT_ONCE", at_once)
    found = write_index(index.store, index.names)
    assert {name: info.groups for name, info in found.splits.items()} == {"train": 7, "val": 3}
    assert found.vocabularies == index.vocabularies


def test_side_by_side_keeps_the_order_and_tells_failures() -> None:
    assert list(side_by_side(lambda n: n * n, range(1000))) == [n * n for n in range(1000)]
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda n: 1 // (n - 300), range(1000)))
