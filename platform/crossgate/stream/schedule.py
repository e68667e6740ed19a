"""Which clip is in which global batch, and in which slot: arithmetic, nothing else.

The order of an epoch is made in three moves, each a pure function of (selection digest, seed, epoch, global batch):

1. shards are permuted and laid end to end, and the result is rotated: a global order of all clips;
2. the order is cut into L lanes of equal length; every global batch takes the same number of clips from each lane;
3. inside a lane, clips are permuted within windows of some steps.

A corpus of at most `MIXED` clips is shuffled as a whole instead of 2 and 3. Slots of a global batch are numbered
lane by lane and a rank owns a contiguous run of them, hence whole lanes, hence a contiguous part of the global
order. See docs/streaming.md for what that guarantees and what it costs.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal

import numpy as np

from crossgate.errors import UserError

MIXED = 16_384
"""Clips among which clips are mixed at any moment, over all lanes together."""
MAX_LANES = 1024
"""Places of the global order that a global batch draws from, at most."""
MIN_WINDOW = 4
"""Steps that a window spans at least."""


class Schedule:
    """One epoch of some shards.

    Args:
        counts: ``(S,)`` clips in each shard, in canonical order; zeros are allowed.
        digest: of the selection.
        seed: of the run.
        epoch: number of the pass.
        global_batch: clips in a step over all ranks.
        tail: the clips that do not fill a last batch are dropped (`drop`), or form a last batch that is filled up
            with the first clips of the epoch's first batch (`wrap`).

    Raises:
        UserError: when there is no clip, or fewer than a batch under `drop`.
    """

    def __init__(
        self,
        counts: np.ndarray,
        *,
        digest: str,
        seed: int,
        epoch: int,
        global_batch: int,
        tail: Literal["drop", "wrap"] = "drop",
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        self.epoch, self.global_batch, self.tail = epoch, global_batch, tail
        self.full, self.rest = divmod(self.total, global_batch)
        self.steps = self.full + (tail == "wrap" and self.rest > 0)
        if not self.steps:
            raise UserError(
                f"{self.total} clips do not fill one global batch of {global_batch}",
                where="data.global_batch",
                cure="make it smaller, or set data.tail to wrap",
            )
        self.lanes = 1 if self.total <= MIXED else lanes_of(global_batch)
        self._chunk = global_batch // self.lanes
        self._windows = max(1, self.full // max(MIN_WINDOW, MIXED // global_batch))
        self._key = _key(digest, seed, epoch)
        self._cached: tuple[tuple[int, int, int], np.ndarray] | None = None

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ``(shards, rows)`` of a global batch, each ``(global_batch,)`` int64."""
        return self.slots(step, 0, 1)

    def slots(self, step: int, rank: int, ranks: int, part: int = 0, parts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Returns what one rank reads of a global batch.

        Args:
            step: number of the global batch in the epoch.
            rank, ranks: who asks.
            part, parts: with gradient accumulation the global batch is first cut into `parts` runs of slots, so that
                what is accumulated together does not depend on the number of ranks either.

        Returns:
            ``(shards, rows)``, each ``(global_batch / ranks / parts,)`` int64.

        Raises:
            UserError: when ranks times parts does not divide the global batch.
            IndexError: for a step outside the epoch.
        """
        share = share_of(self.global_batch, ranks, parts)
        first = (part * ranks + rank) * share
        return self.between(step, first, first + share)

    def between(self, step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ``(shards, rows)`` of the slots ``first <= slot < last`` of a global batch.

        Raises:
            IndexError: for a step outside the epoch.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        return self._locate(self._order(step, first, last))

    # ---- slot -> place in the global order -----------------------------------------------------------------------

    def _order(self, step: int, first: int, last: int) -> np.ndarray:
        """Places in the global order of the slots ``first <= slot < last`` of a step."""
        if step == self.full:
            return self._tail(first, last)
        slots = np.arange(first, last)
        if self._whole is not None:
            return step * self.global_batch + slots
        lane, place = np.divmod(slots, self._chunk)
        window = ((step + 1) * self._windows - 1) // self.full
        begin, end = (edge * self.full // self._windows for edge in (window, window + 1))
        first_lane = int(lane[0])
        mixed = self._mix(window, (end - begin) * self._chunk, first_lane, int(lane[-1]) + 1)
        within = mixed[lane - first_lane, (step - begin) * self._chunk + place]
        return (lane * self.full + begin) * self._chunk + within

    def _tail(self, first: int, last: int) -> np.ndarray:
        """The last batch under `wrap`: what is left over, then the first slots of batch 0."""
        slots = np.arange(first, last)
        if not self.full:
            return slots % self.total
        left = self.full * self.global_batch + slots[slots < self.rest]
        if last <= self.rest:
            return left
        return np.concatenate([left, self._order(0, max(first - self.rest, 0), last - self.rest)])

    def _mix(self, window: int, size: int, first: int, last: int) -> np.ndarray:
        """``(lanes, size)`` permutations of one window in the lanes ``first <= lane < last``."""
        asked = (window, first, last)
        if self._cached is None or self._cached[0] != asked:
            lanes = np.arange(first, last, dtype=np.uint64)[:, None]
            keys = hashed(self._key + np.uint64(window), lanes)
            self._cached = asked, np.argsort(hashed(keys, np.arange(size, dtype=np.uint64)), axis=1, kind="stable")
        return self._cached[1]

    # ---- place in the global order -> clip -----------------------------------------------------------------------

    @cached_property
    def _whole(self) -> np.ndarray | None:
        """The permutation of all clips, where there are few."""
        if self.total > MIXED:
            return None
        return np.argsort(hashed(~self._key, np.arange(self.total, dtype=np.uint64)), kind="stable")

    @cached_property
    def _shards(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Permuted shards, where each ends in the global order, and by how much that order is rotated."""
        shards = np.argsort(hashed(self._key, np.arange(len(self.counts), dtype=np.uint64)), kind="stable")
        turn = int(hashed(self._key, np.array([len(self.counts)], np.uint64))[0]) % self.total
        return shards, np.cumsum(self.counts[shards]), turn

    def _locate(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, ends, turn = self._shards
        if self._whole is not None:
            order = self._whole[order]
        clip = (order + turn) % self.total
        place = np.searchsorted(ends, clip, side="right")
        shard = shards[place]
        return shard, clip - (ends[place] - self.counts[shard])


def lanes_of(global_batch: int) -> int:
    """Returns the largest divisor of the global batch that is at most `MAX_LANES`."""
    return next(n for n in range(min(global_batch, MAX_LANES), 0, -1) if global_batch % n == 0)


def share_of(global_batch: int, ranks: int, parts: int = 1) -> int:
    """Returns a rank's clips in one part of a global batch.

    Raises:
        UserError: when it is no whole number.
    """
    share, left = divmod(global_batch, ranks * parts)
    if left or not share:
        raise UserError(
            f"a global batch of {global_batch} cannot be shared by {ranks} ranks x {parts} micro-batches",
            where="data.global_batch",
            expected=f"a multiple of {ranks * parts}",
        )
    return share


def clip_seed(seed: int, clip: int, epoch: int) -> int:
    """Returns the 63-bit seed of a clip's augmentation: the clip's and the epoch's, and nothing else's."""
    return int(_key("augment", seed, epoch, clip)) >> 1


def hashed(key: np.ndarray | np.uint64, x: np.ndarray) -> np.ndarray:
    """Returns 64 well-mixed bits a number (SplitMix64's finaliser, twice); the same on every platform and version."""
    with np.errstate(over="ignore"):
        return _splitmix(_splitmix(x) ^ key)


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: object) -> np.uint64:
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
