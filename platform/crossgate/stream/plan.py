"""What the n-th batch of a loader is made of, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crossgate.stream.index import Selection
from crossgate.stream.schedule import Schedule, share_of


@dataclass(frozen=True)
class Unit:
    """The n clips of one batch of one rank.

    Attributes:
        shards: ``(n,)`` numbers of shards in the index of their corpus.
        rows: ``(n,)`` numbers of clips in them.
        epochs: ``(n,)`` passes of their corpus that they are drawn for.
        corpora: ``(n,)`` numbers of their corpora: 0 is the first.
    """

    shards: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray
    corpora: np.ndarray


class TrainingPlan:
    """Endless: unit ``(epoch * steps + step) * parts + part`` is a rank's share of a part of a global batch.

    Attributes:
        steps: global batches in an epoch.
        share: clips of a unit.
        units: how many there are; None: no end.

    Args:
        selection: of the corpus whose passes are the epochs.
        further: other corpora, and how many clips of a global batch each gives; the first one gives the rest.
        seed, global_batch, tail, rank, ranks, parts: as in `Schedule`.
    """

    units = None

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
        further: Sequence[tuple[Selection, int]] = (),
    ) -> None:
        self.rank, self.ranks, self.parts = rank, ranks, parts
        self.share = share_of(global_batch, ranks, parts)
        self.shares = [global_batch - sum(share for _, share in further), *(share for _, share in further)]
        selections = [selection, *(other for other, _ in further)]
        self.passes = [_Passes(chosen, seed, share, tail) for chosen, share in zip(selections, self.shares)]
        self.steps = self.passes[0].steps
        self._pattern = spread(self.shares)
        self._before = np.stack([np.cumsum(self._pattern == n) - (self._pattern == n) for n in range(len(self.shares))])

    def __getitem__(self, number: int) -> Unit:
        step, part = divmod(number, self.parts)
        first = (part * self.ranks + self.rank) * self.share
        corpora = self._pattern[first : first + self.share]
        shards, rows, epochs = (np.empty(self.share, np.int64) for _ in range(3))
        for corpus, passes in enumerate(self.passes):
            here = corpora == corpus
            if not here.any():
                continue
            begin = int(self._before[corpus, first])
            epoch, *found = passes.take(step, begin, begin + int(here.sum()))
            shards[here], rows[here] = found
            epochs[here] = epoch
        return Unit(shards, rows, epochs, corpora)


class _Passes:
    """One corpus, pass after pass; step s of the run is step ``s % steps`` of pass ``s // steps``."""

    def __init__(self, selection: Selection, seed: int, share: int, tail: Literal["drop", "wrap"]) -> None:
        self.selection, self.seed, self.share, self.tail = selection, seed, share, tail
        self.schedule = self._make(0)
        self.steps = self.schedule.steps

    def take(self, step: int, first: int, last: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns the pass, and ``(shards, rows)`` of slots of this corpus in a step counted over all epochs."""
        epoch, step = divmod(step, self.steps)
        if self.schedule.epoch != epoch:
            self.schedule = self._make(epoch)
        places, rows = self.schedule.between(step, first, last)
        return epoch, self.selection.shards[places], rows

    def _make(self, epoch: int) -> Schedule:
        return Schedule(
            self.selection.counts,
            digest=self.selection.digest,
            seed=self.seed,
            epoch=epoch,
            global_batch=self.share,
            tail=self.tail,
        )


def spread(shares: Sequence[int]) -> np.ndarray:
    """Returns the corpus of each slot of a global batch, ``(sum(shares),)``.

    Each corpus is spread evenly, so that ranks and micro-batches hold nearly the same mixture, and a contiguous run of
    slots is a contiguous run of each corpus's own slots: what a rank reads of a corpus stays together.
    """
    middles = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
    corpora = np.repeat(np.arange(len(shares)), shares)
    return corpora[np.argsort(middles, kind="stable")]


class EvaluationPlan:
    """Every clip once, in the order of the index; a rank has a contiguous slice, whose last batch may be short.

    With a limit, the clips are taken at equal distances, so that no class is left out because its shard comes last.

    Attributes:
        units: how many there are.
    """

    def __init__(
        self, selection: Selection, *, batch_size: int, rank: int = 0, ranks: int = 1, limit: int | None = None
    ) -> None:
        self.shards, self.batch_size = selection.shards, batch_size
        self._counts, self._ends = selection.counts, np.cumsum(selection.counts)
        self._total = selection.total
        self._taken = min(self._total, self._total if limit is None else limit)
        self._begin, self._end = (self._taken * r // ranks for r in (rank, rank + 1))
        self.units = -(-(self._end - self._begin) // batch_size)

    def __getitem__(self, number: int) -> Unit:
        first = self._begin + number * self.batch_size
        place = np.arange(first, min(first + self.batch_size, self._end), dtype=np.int64)
        clip = place * self._total // self._taken
        shard = np.searchsorted(self._ends, clip, side="right")
        nothing = np.zeros(len(place), np.int64)
        return Unit(self.shards[shard], clip - (self._ends[shard] - self._counts[shard]), nothing, nothing)
