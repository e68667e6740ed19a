"""What the n-th batch of a loader is made of, for training and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from crossgate.stream.index import Selection
from crossgate.stream.schedule import Schedule, share_of


@dataclass(frozen=True)
class Unit:
    """The clips of one batch of one rank: shard numbers and rows ``(n,)``, and the epoch that they are drawn for."""

    epoch: int
    shards: np.ndarray
    rows: np.ndarray


class TrainingPlan:
    """Endless: unit ``(epoch * steps + step) * parts + part`` is a rank's share of a part of a global batch."""

    def __init__(
        self,
        selection: Selection,
        *,
        seed: int,
        global_batch: int,
        tail: Literal["drop", "wrap"],
        rank: int = 0,
        ranks: int = 1,
        parts: int = 1,
    ) -> None:
        self.shards, self.counts, self.digest = selection.shards, selection.counts, selection.digest
        self.seed, self.global_batch, self.tail = seed, global_batch, tail
        self.rank, self.ranks, self.parts = rank, ranks, parts
        self.share = share_of(global_batch, ranks, parts)
        self._schedule = self._make(0)
        self.steps = self._schedule.steps

    def __getitem__(self, number: int) -> Unit:
        step, part = divmod(number, self.parts)
        epoch, step = divmod(step, self.steps)
        if self._schedule.epoch != epoch:
            self._schedule = self._make(epoch)
        places, rows = self._schedule.slots(step, self.rank, self.ranks, part, self.parts)
        return Unit(epoch, self.shards[places], rows)

    def _make(self, epoch: int) -> Schedule:
        return Schedule(
            self.counts,
            digest=self.digest,
            seed=self.seed,
            epoch=epoch,
            global_batch=self.global_batch,
            tail=self.tail,
        )


class EvaluationPlan:
    """Every clip once, in the order of the index; a rank has a contiguous slice, whose last batch may be short.

    With a limit, the clips are taken at equal distances, so that no class is left out because its shard comes last.
    """

    def __init__(
        self, selection: Selection, *, batch_size: int, rank: int = 0, ranks: int = 1, limit: int | None = None
    ) -> None:
        self.shards, self.batch_size = selection.shards, batch_size
        self._counts, self._ends = selection.counts, np.cumsum(selection.counts)
        self._total = selection.total
        self._taken = min(self._total, self._total if limit is None else limit)
        self._begin, self._end = (self._taken * r // ranks for r in (rank, rank + 1))

    def __getitem__(self, number: int) -> Unit:
        first = self._begin + number * self.batch_size
        if not self._begin <= first < self._end:
            raise IndexError(number)
        place = np.arange(first, min(first + self.batch_size, self._end), dtype=np.int64)
        clip = place * self._total // self._taken
        shard = np.searchsorted(self._ends, clip, side="right")
        return Unit(0, self.shards[shard], clip - (self._ends[shard] - self._counts[shard]))
