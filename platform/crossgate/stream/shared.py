"""Numbers that several shards have, as hashes of groups or keys: found by sorting, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from crossgate.errors import NO_MORE, UserError, cure_for

PAIRS_IN_MEMORY = 1 << 22
"""Pairs of a number and a shard that are held before they go to files: 50 MB, thrice that while they are sorted."""

_PAIR = np.dtype([("number", "<i8"), ("shard", "<i4")])
_BITS = 8  # a file for each value of the highest bits: of 10⁹ pairs one file holds four million
_SHIFT = np.int64(63 - _BITS)  # numbers are hashes of 63 bits


class SharedNumbers:
    """Collects the numbers of shards, given in any order, and tells in which shards each occurs.

    Beyond a limit pairs lie in temporary files, 12 bytes each, parted by their highest bits; ``TMPDIR`` says where.

    Args:
        limit: pairs in memory.
    """

    def __init__(self, limit: int = PAIRS_IN_MEMORY) -> None:
        self._limit, self._held = limit, 0
        self._parts: list[NDArray[np.void]] = []
        self._folder: TemporaryDirectory[str] | None = None

    def add(self, shard: int, numbers: NDArray[np.int64]) -> None:
        """Takes the numbers of one shard, 63-bit hashes; one that occurs twice there counts once.

        Raises:
            UserError: when the disk of the temporary files is full.
        """
        distinct = np.unique(numbers)
        pairs = np.empty(len(distinct), _PAIR)
        pairs["number"], pairs["shard"] = distinct, shard
        self._parts.append(pairs)
        self._held += len(pairs)
        if self._held > self._limit:
            self._to_files()

    def occurrences(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]]:
        """Yields ``(numbers, shards, firsts)``, each ``(n,)``, a part of all pairs at a time; call it once.

        A number is in one part only. Pairs are sorted by number, then shard; `firsts` is the number's first shard, so
        that a pair with another shard there is a number that two shards have.
        """
        for pairs in self._buckets():
            if len(pairs):
                pairs = pairs[np.lexsort((pairs["shard"], pairs["number"]))]
                numbers, shards = pairs["number"], pairs["shard"]
                starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
                yield numbers, shards, np.repeat(shards[starts], np.diff(np.r_[starts, len(pairs)]))

    def _buckets(self) -> Iterator[NDArray[np.void]]:
        if self._folder is None:
            yield np.concatenate([np.empty(0, _PAIR), *self._parts])
            return
        self._to_files()
        with self._folder as folder:
            for file in sorted(Path(folder).iterdir()):
                yield np.fromfile(file, _PAIR)
                file.unlink()

    def _to_files(self) -> None:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="crossgate-numbers-")
        pairs = np.concatenate([np.empty(0, _PAIR), *self._parts])
        self._parts, self._held = [], 0
        bucket = pairs["number"] >> _SHIFT
        pairs = pairs[np.argsort(bucket, kind="stable")]
        edges = np.cumsum(np.bincount(bucket, minlength=1 << _BITS))
        try:
            for number, part in enumerate(np.split(pairs, edges[:-1])):
                with open(Path(self._folder.name) / f"{number:03d}", "ab") as file:
                    file.write(part.tobytes())
        except OSError as error:
            if error.errno not in NO_MORE:
                raise
            raise UserError(
                f"no temporary files can be written ({error.strerror})",
                where=self._folder.name,
                cure=f"{cure_for(error.errno)}, or name another one in TMPDIR",
            ) from error
