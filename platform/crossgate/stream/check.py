"""Is everything in this folder what its index says? Every shard is read whole; what is broken is named."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from crossgate import environment
from crossgate.config import ClipConfig
from crossgate.errors import UserError
from crossgate.modality import ordered
from crossgate.stream.collate import Decode, default_decode
from crossgate.stream.foreign import scan_tar
from crossgate.stream.index import Index
from crossgate.stream.processes import worker_context
from crossgate.stream.shared import SharedNumbers
from crossgate.stream.sidecar import ClipRecord, Sidecar, group_hash, layout_digest
from crossgate.stream.storage import PIECE
from crossgate.workers import end_with_parent

_AT_ONCE = 4 * PIECE


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{f', clip {self.key}' if self.key else ''}: {self.what}"


@dataclass
class CheckReport:
    """What `check` found."""

    url: str
    shards: int = 0
    clips: int = 0
    bytes: int = 0
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is broken."""
        return not self.problems

    def summary(self) -> str:
        """Returns one line for a person."""
        size = f"{self.shards} shards, {self.clips} clips ({self.decoded} decoded), {self.bytes / 1e6:.1f} MB"
        found = f"{len(self.problems)} problems" if self.problems else "all is well"
        return f"{size}: {found}: {self.url}"


@dataclass
class _ShardReport:
    number: int
    problems: list[Problem] = field(default_factory=list)
    decoded: int = 0
    groups: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def check(
    url: str,
    *,
    fast: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    decode: Decode | None = None,
) -> CheckReport:
    """Compares every shard with the index: length, digest, members, labels, groups; and decodes every clip.

    Args:
        url: folder of the shards.
        fast: do not decode.
        workers: processes (0: one a core; 1: none besides this one).
        progress: called with (shards done, shards in all).
        decode: the codec (`clips.tensors.clip_tensors` if None).

    Raises:
        UserError: when there is no usable index at all.
    """
    index = Index.load(url)
    report = CheckReport(url, len(index.names), int(index.clips.sum()), int(index.bytes.sum()))
    groups, keys = SharedNumbers(), SharedNumbers()
    for done, part in enumerate(_all_shards(index, fast, workers, decode), start=1):
        groups.add(part.number, part.groups)
        keys.add(part.number, part.keys)
        report.problems += part.problems
        report.decoded += part.decoded
        if progress:
            progress(done, len(index.names))
    report.problems += _across_shards(index, groups, keys)
    if index.home.url == index.store.url:
        strays = set(index.store.list(".tar")) - set(index.names)
        report.problems += [Problem(name, "", "is not in the index") for name in strays]
    report.problems.sort(key=lambda problem: (problem.shard, problem.key))
    return report


def _all_shards(index: Index, fast: bool, workers: int, decode: Decode | None) -> Iterator[_ShardReport]:
    numbers = range(len(index.names))
    workers = min(workers or environment.usable_cores(), len(numbers))
    if workers <= 1:
        yield from (_check_shard(index, number, fast, decode) for number in numbers)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=worker_context(),
        initializer=_begin,
        initargs=(environment.snapshot(), index, fast, decode),  # once a process: the index is large
    ) as pool:
        jobs = [pool.submit(_check_numbered, number) for number in numbers]
        for job in as_completed(jobs):
            yield job.result()


_given: tuple[Index, bool, Decode | None] | None = None


def _begin(variables: Any, index: Index, fast: bool, decode: Decode | None) -> None:
    global _given
    end_with_parent()
    environment.restore(variables)
    _given = index, fast, decode


def _check_numbered(number: int) -> _ShardReport:
    assert _given is not None
    index, fast, decode = _given
    return _check_shard(index, number, fast, decode)


def _check_shard(index: Index, number: int, fast: bool, decode: Decode | None) -> _ShardReport:
    name, report = index.names[number], _ShardReport(number)
    try:
        sidecar = index.sidecar(number)
        report.groups = sidecar.group
        report.keys = _key_hashes(sidecar)
        with _local(index, name) as file:
            report.problems += _damage(index, number, file)
            found = scan_tar(file, name)
            report.problems += _differences(index, number, sidecar, found)
            if not fast:
                report.decoded, broken = _decode_all(file, name, [record for record, _ in found], decode)
                report.problems += broken
    except UserError as error:
        report.problems.append(Problem(name, "", error.what))
    except OSError as error:  # of a disk: a remote store's failures are explained by it
        report.problems.append(Problem(name, "", f"cannot be read ({error.strerror or error})"))
    return report


@contextmanager
def _local(index: Index, name: str) -> Iterator[BinaryIO]:
    """The shard as a local file; a remote one is fetched whole, once."""
    with index.store.open(name) as file:
        if index.store.local:
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy, _AT_ONCE)
            copy.seek(0)
            yield copy


def _damage(index: Index, number: int, file: BinaryIO) -> list[Problem]:
    name, row = index.names[number], index.table.slice(number, 1).to_pylist()[0]
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size != row["bytes"]:
        return [Problem(name, "", f"has {size} bytes, the index says {row['bytes']}")]
    if row["sha256"] and _sha256(file) != row["sha256"]:
        return [Problem(name, "", "its bytes are not those that were indexed (SHA-256 differs)")]
    return []


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _differences(index: Index, number: int, sidecar: Sidecar, found: list[tuple[ClipRecord, str]]) -> list[Problem]:
    name, row = index.names[number], index.table.slice(number, 1).to_pylist()[0]
    if not len(found) == len(sidecar) == row["clips"]:
        counts = f"{len(found)} clips in the tar, {len(sidecar)} in the sidecar, {row['clips']} in the index"
        return [Problem(name, "", counts)]
    problems = []
    if layout_digest([sidecar.record(i) for i in range(len(sidecar))]) != row["layout"]:
        problems.append(Problem(name, "", "its sidecar is not the one that was indexed"))
    for i, (record, split) in enumerate(found):
        written = sidecar.record(i)
        if replace(record, degraded={}) != replace(written, degraded={}):
            problems.append(Problem(name, record.key, "the tar and its sidecar disagree"))
        if split != row["split"] and row["sha256"]:
            problems.append(Problem(name, record.key, f"is of split {split!r} in a shard of {row['split']!r}"))
        for task, label in written.labels.items():
            if label not in index.vocabularies.get(task, ()):
                problems.append(Problem(name, record.key, f"label {label!r} is not in the vocabulary of {task!r}"))
    return problems


def _decode_all(
    file: BinaryIO, name: str, records: list[ClipRecord], decode: Decode | None
) -> tuple[int, list[Problem]]:
    decode = decode or default_decode()
    good, problems = 0, []
    for record in records:
        try:
            tensors = decode(_members(file, record), ClipConfig(modalities=record.modalities), None, 0)
            missing = set() if "mp4" in record.members else set(record.modalities) - tensors.keys()
            if missing:
                raise ValueError(f"{', '.join(ordered(missing))} is missing")
            good += 1
        except Exception as error:  # whatever a broken file makes a codec do
            problems.append(Problem(name, record.key, f"cannot be decoded ({type(error).__name__}: {error})"))
    return good, problems


def _members(file: BinaryIO, record: ClipRecord) -> dict[str, bytes]:
    members = {}
    for suffix, (offset, size) in record.members.items():
        file.seek(offset)
        members[suffix] = file.read(size)
    return members


def _across_shards(index: Index, groups: SharedNumbers, keys: SharedNumbers) -> list[Problem]:
    """A group in two splits; a key in two shards."""
    problems = []
    splits = np.asarray(index.table.column("split").to_pylist())
    for numbers, shards, firsts in groups.occurrences():
        for at in np.flatnonzero(splits[shards] != splits[firsts]):
            sidecar = index.sidecar(int(shards[at]))
            label = sidecar.group_name(int(np.flatnonzero(sidecar.group == numbers[at])[0]))
            what = f"group {label!r} is in splits {splits[firsts[at]].item()!r} and {splits[shards[at]].item()!r}"
            problems.append(Problem(index.names[shards[at]], "", what))
    for numbers, shards, firsts in keys.occurrences():
        for at in np.flatnonzero(shards != firsts):
            sidecar = index.sidecar(int(shards[at]))
            key = sidecar.key(int(np.flatnonzero(_key_hashes(sidecar) == numbers[at])[0]))
            problems.append(Problem(index.names[shards[at]], key, f"this key is also in {index.names[firsts[at]]}"))
    return problems


def _key_hashes(sidecar: Sidecar) -> NDArray[np.int64]:
    return np.array([group_hash(sidecar.key(row)) for row in range(len(sidecar))], np.int64)
