"""What the sidecars of all shards say together: the groups of each split, the classes of each task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from crossgate.errors import UserError
from crossgate.stream.shared import SharedNumbers
from crossgate.stream.sidecar import ShardEntry, Sidecar, finished_shard
from crossgate.stream.storage import Store

_THREADS = 16
_AT_ONCE = 256  # results that may wait for their turn

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Survey:
    """What shards hold together.

    Attributes:
        groups: split -> how many.
        classes: task -> class names that occur.
    """

    groups: dict[str, int]
    classes: dict[str, set[str]]


def finished_shards(store: Store, names: Sequence[str]) -> list[ShardEntry | None]:
    """Returns `finished_shard` of each, several asked for at a time: each costs a way to the store and back or two."""
    return list(side_by_side(lambda name: finished_shard(store, name), names))


def survey(store: Store, home: Store, entries: Sequence[ShardEntry]) -> Survey:
    """Reads every sidecar, several at a time; memory does not grow with the clips.

    Args:
        store: of the shards.
        home: of their sidecars.
        entries: the shards.

    Raises:
        UserError: for a group in two splits, or a sidecar that is missing or damaged.
    """
    names = sorted({entry.split for entry in entries})
    splits = np.array([names.index(entry.split) for entry in entries], np.int32)
    groups, classes = SharedNumbers(), dict[str, set[str]]()
    for shard, (numbers, found) in enumerate(side_by_side(lambda entry: _facts(home, entry), entries)):
        groups.add(shard, numbers)
        for task, words in found.items():
            classes.setdefault(task, set()).update(words)
    counts = np.zeros(len(names), np.int64)
    for numbers, shards, firsts in groups.occurrences():
        astray = np.flatnonzero(splits[shards] != splits[firsts])
        if len(astray):
            at = astray[0]
            raise _in_two_splits(store, home, int(numbers[at]), entries[firsts[at]], entries[shards[at]])
        counts += np.bincount(splits[firsts[shards == firsts]], minlength=len(names))
    return Survey(dict(zip(names, counts.tolist())), classes)


def side_by_side(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """Yields ``function(item)`` in the order of the items, several computed at a time in threads."""
    if len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        for first in range(0, len(items), _AT_ONCE):
            yield from pool.map(function, items[first : first + _AT_ONCE])


def _facts(home: Store, entry: ShardEntry) -> tuple[NDArray[np.int64], dict[str, set[str]]]:
    sidecar = Sidecar.load(home, entry.name)
    return np.unique(sidecar.group), {task: sidecar.classes(task) for task in sidecar.tasks}


def _in_two_splits(store: Store, home: Store, group: int, one: ShardEntry, other: ShardEntry) -> UserError:
    sidecar = Sidecar.load(home, other.name)
    name = sidecar.group_name(int(np.flatnonzero(sidecar.group == group)[0]))
    return UserError(
        f"group {name!r} is in splits {one.split!r} and {other.split!r}",
        where=store.path(other.name),
        cure="give all clips of a source one split",
    )
