"""Batches for a trainer: exactly once, in an order that no number of ranks or workers changes, resumable anywhere."""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from crossgate import environment
from crossgate.batch import ClipBatch
from crossgate.config import AugmentConfig, DataConfig
from crossgate.errors import Passing, UserError
from crossgate.stream.collate import BadClip, Collator, Decode, Outcome, default_decode
from crossgate.stream.index import Index
from crossgate.stream.mix import mix_digest, open_corpora
from crossgate.stream.plan import EvaluationPlan, TrainingPlan, Unit
from crossgate.stream.processes import worker_context
from crossgate.stream.reader import FetchedClip
from crossgate.workers import end_with_parent

STATE_VERSION = 1
AHEAD = 4
"""Batches of a process that travel from a remote store while another one is decoded."""

_log = logging.getLogger(__name__)


class ClipLoader:
    """Endless batches of one rank, from any point of any epoch.

    Args:
        index: of the shards in `data.index`.
        splits: of it, to read.
        data: further corpora, global batch, tail, clip, augmentation, workers.
        seed: of schedule and augmentation.
        rank, ranks: who reads.
        micro_batch: clips in a batch handed over; the rank's whole share of a global batch if None.
        decode: the codec (`clips.tensors.clip_tensors` if None).

    Raises:
        UserError: for splits or modalities that the index does not have, or a batch that cannot be shared out.
    """

    def __init__(
        self,
        index: Index,
        splits: Iterable[str],
        data: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        micro_batch: int | None = None,
        decode: Decode | None = None,
    ) -> None:
        corpora = open_corpora(index, splits, data)
        self._parts = _parts(data.global_batch, ranks, micro_batch)
        self._plan = TrainingPlan(
            corpora[0].selection,
            further=[(corpus.selection, corpus.share) for corpus in corpora[1:]],
            seed=seed,
            global_batch=data.global_batch,
            tail=data.tail,
            rank=rank,
            ranks=ranks,
            parts=self._parts,
        )
        augment = data.augment if data.augment.enabled else None
        self._dataset = _Units([corpus.index for corpus in corpora], self._plan, data, augment, seed, decode)
        self._data = data
        self._account = _Account(data.max_bad_clips, alone=ranks == 1)
        self._rank = rank
        self._epoch = self._step = 0
        self._identity = {
            "digest": mix_digest(corpora),
            "seed": seed,
            "global_batch": data.global_batch,
            "tail": data.tail,
        }

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch: one pass of the first corpus."""
        return self._plan.steps

    def __iter__(self) -> Iterator[ClipBatch]:
        first = (self._epoch * self._plan.steps + self._step) * self._parts
        batches = _batches(self._dataset.starting_at(first), self._data, self._account)
        for done, batch in enumerate(batches, start=1):
            self._epoch, self._step = divmod((first + done) // self._parts, self._plan.steps)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns where the trainer is: the next step it has not been handed, whatever was decoded ahead."""
        where = {"version": STATE_VERSION, "epoch": self._epoch, "step": self._step, **self._identity}
        return where | {"bad_clips": sorted(self._account.agreed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state_dict` was taken, by any number of ranks and workers; the next ``iter`` starts there.

        Raises:
            UserError: when the state belongs to other clips, another seed, batch size or tail.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"loader state of version {state.get('version')}", expected=str(STATE_VERSION))
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"cannot resume: {name} was {state.get(name)!r} and is {value!r}",
                    where="data",
                    cure="resume with the settings and shards that the run began with, or start a new run",
                )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])
        self._account.agreed.update(state.get("bad_clips", ()))

    def settle(self, gather: Callable[[Any], list[Any]]) -> None:
        """Lets all ranks agree on the clips that were skipped; every rank calls it after the same step.

        Args:
            gather: takes this rank's item and returns every rank's, in the order of ranks.

        Raises:
            UserError: on every rank alike, when more than `data.max_bad_clips` were skipped over all ranks.
        """
        for rank, part in enumerate(gather(self._account.unsettled())):
            self._account.settle(part, tell=self._rank == 0 and rank != 0)
        self._account.enforce()

    def meters(self) -> dict[str, float]:
        """Returns running totals of this rank: clips, bytes from store and cache, retries, seconds waited, bad clips.

        Bad clips are those of all ranks, as far as `settle` knows them. Beside the totals, since the last call: 10⁶
        bytes a second from store and from cache, and the mean number of decoded batches that lay ready when the
        trainer asked for one (0: it always waited).
        """
        return self._account.meters()

    @property
    def bad_clips(self) -> list[BadClip]:
        """Clips that were skipped, each once: this rank's, and those of others that `settle` brought."""
        return list(self._account.bad.values())


def sequential(
    index: Index,
    splits: Iterable[str],
    data: DataConfig,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    limit: int | None = None,
    decode: Decode | None = None,
    skipped: list[BadClip] | None = None,
) -> Iterator[ClipBatch]:
    """Yields every clip once, in the order of the index, without augmentation; the last batch may be short.

    Args:
        index: of the shards.
        splits: to read.
        data: clip, workers, limit of bad clips.
        batch_size: clips a batch.
        rank, ranks: the rank gets a contiguous slice; slices differ by at most one clip.
        limit: take so many clips only, at equal distances.
        decode: the codec (`clips.tensors.clip_tensors` if None).
        skipped: gets the clips that cannot be decoded. A single rank stops when there are too many; several ranks
            find out together, by `agreed_skips` after the last batch.

    Raises:
        UserError: for splits that the index does not have.
    """
    selection = index.select(splits)  # a modality that no clip of the split has is absent in all of them
    plan = EvaluationPlan(selection, batch_size=batch_size, rank=rank, ranks=ranks, limit=limit)
    units = _Units([index], plan, data, None, 0, decode)
    return _batches(units, data, _Account(data.max_bad_clips, skipped, alone=ranks == 1))


def agreed_skips(skipped: list[BadClip], data: DataConfig, gather: Callable[[Any], list[Any]]) -> int:
    """Returns how many clips all ranks skipped together; every rank calls it after its last batch of `sequential`.

    Args:
        skipped: by this rank.
        data: limit of bad clips.
        gather: takes this rank's item and returns every rank's, in the order of ranks.

    Raises:
        UserError: on every rank alike, when more than `data.max_bad_clips` were skipped over all ranks.
    """
    account = _Account(data.max_bad_clips)
    for part in gather(skipped):
        account.settle(part, tell=False)
    account.enforce()
    return len(account.bad)


class _Units(IterableDataset):
    """Units ``start, start + 1, ...``; of W workers, worker w makes every W-th from ``start + w`` on."""

    def __init__(
        self,
        indices: Sequence[Index],
        plan: TrainingPlan | EvaluationPlan,
        data: DataConfig,
        augment: AugmentConfig | None,
        seed: int,
        decode: Decode | None,
    ) -> None:
        self.indices, self.plan, self.start = indices, plan, 0
        self.made: Any = None  # batches that each worker has made
        self._collator = (data.clip, augment, seed, decode, data.cache)

    def starting_at(self, start: int) -> _Units:
        """Sets the first unit."""
        self.start = start
        return self

    def __iter__(self) -> Iterator[Outcome]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        clip, augment, seed, decode, cache = self._collator
        collator = Collator(self.indices, clip, augment, seed, decode or default_decode(), cache)
        units = self._units(self.start + number, stride)
        local = all(index.store.local for index in self.indices)
        try:
            for unit, clips in _ahead(collator, units, 0 if local else AHEAD):
                outcome = collator.collate(clips, unit.epochs.tolist())
                if worker:
                    self.made[worker.id] += 1
                yield outcome
        except UserError as error:  # as a value: DataLoader would rebuild it from the text of a stack trace
            yield Outcome(error=error)
        finally:
            collator.close()

    def _units(self, number: int, stride: int) -> Iterator[Unit]:
        while self.plan.units is None or number < self.plan.units:
            yield self.plan[number]
            number += stride


class _Account:
    """What was read, what was bad, and when that is too much.

    Args:
        limit: of bad clips.
        skipped: gets them too.
        alone: nobody else has to agree before the limit stops this process.
    """

    def __init__(self, limit: int, skipped: list[BadClip] | None = None, *, alone: bool = True) -> None:
        self.limit, self.alone, self.clips, self.waited = limit, alone, 0, 0.0
        self.ready: deque[int] = deque(maxlen=1000)  # of whom nobody asks for meters, none may pile up
        self.skipped = skipped if skipped is not None else []
        self.bad: dict[int, BadClip] = {}
        self.agreed: set[int] = set()
        self._traffic: Counter[str] = Counter(dict.fromkeys(("read_bytes", "cache_bytes", "kept_bytes", "retries"), 0))
        self._last = (time.perf_counter(), 0, 0)
        self._told: set[str] = set()

    def add(self, outcome: Outcome, waited: float) -> ClipBatch:
        """Books an outcome and returns its batch."""
        self.waited += waited
        if outcome.error is not None:
            raise outcome.error
        assert outcome.batch is not None
        self.clips += len(outcome.batch)
        self._traffic.update(outcome.traffic)
        for note in outcome.notes:
            if note not in self._told:
                self._told.add(note)
                _log.warning("%s", note)
        for bad in outcome.bad:
            self._note(bad, tell=True)
        if self.alone:
            self.enforce()
        return outcome.batch

    def unsettled(self) -> list[BadClip]:
        """Returns the bad clips that other ranks do not know of."""
        return [bad for clip, bad in self.bad.items() if clip not in self.agreed]

    def settle(self, found: list[BadClip], *, tell: bool) -> None:
        """Takes over what one of the ranks found."""
        for bad in found:
            self._note(bad, tell=tell)
            self.agreed.add(bad.clip)

    def enforce(self) -> None:
        """Stops the run when there are too many."""
        if len(self.bad.keys() | self.agreed) > self.limit:
            one = f", {self.bad[max(self.bad)]} for one" if self.bad else ""
            raise UserError(
                f"more than {self.limit} clips cannot be used{one}",
                where="data.max_bad_clips",
                cure="run crossgate check on the index, or raise the limit",
            )

    def meters(self) -> dict[str, float]:
        now = (time.perf_counter(), self._traffic["read_bytes"], self._traffic["cache_bytes"])
        seconds, read, cached = (new - old for new, old in zip(now, self._last))
        depth = sum(self.ready) / max(len(self.ready), 1)
        self._last = now
        self.ready.clear()
        return {
            "data/read_mb_per_s": read / seconds / 1e6,
            "data/cache_mb_per_s": cached / seconds / 1e6,
            "data/queue_depth": depth,
            "data/clips": float(self.clips),
            **{f"data/{name}": float(value) for name, value in self._traffic.items()},
            "data/bad_clips": float(len(self.bad.keys() | self.agreed)),
            "data/wait_s": self.waited,
        }

    def _note(self, bad: BadClip, *, tell: bool) -> None:
        if bad.clip not in self.bad:
            self.bad[bad.clip] = bad
            self.skipped.append(bad)
            if tell:
                _log.warning("skipped %s", bad)


def _batches(units: _Units, data: DataConfig, account: _Account) -> Iterator[ClipBatch]:
    workers = data.loader_workers
    units.made = worker_context().RawArray("q", workers) if workers else None
    loader = DataLoader(
        units,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=data.prefetch if workers else None,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=partial(_begin, environment.snapshot()) if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that making an iterator does not advance the trainer's
    )
    outcomes, taken = iter(loader), 0
    while True:
        account.ready.append(sum(units.made) - taken if workers else 0)
        taken += 1
        before = time.perf_counter()
        try:
            outcome = next(outcomes)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            raise Passing(
                "a decoding process died",
                where="data.loader_workers",
                cure="if it was killed for memory, use fewer workers or a smaller data.prefetch",
            ) from error
        yield account.add(outcome, time.perf_counter() - before)


def _ahead(collator: Collator, units: Iterator[Unit], depth: int) -> Iterator[tuple[Unit, list[FetchedClip]]]:
    """Fetches units; so many more travel, all at the same time, while one is decoded and used."""
    if not depth:
        yield from ((unit, collator.fetch(unit)) for unit in units)
        return
    pool = ThreadPoolExecutor(depth, "read-ahead")
    coming: deque[tuple[Unit, Future[list[FetchedClip]]]] = deque()
    try:
        for unit in units:
            coming.append((unit, pool.submit(collator.fetch, unit)))
            if len(coming) > depth:
                yield _arrived(*coming.popleft())
        while coming:
            yield _arrived(*coming.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _arrived(unit: Unit, clips: Future[list[FetchedClip]]) -> tuple[Unit, list[FetchedClip]]:
    return unit, clips.result()


def _begin(values: dict[str, str], worker: int) -> None:
    end_with_parent()  # torch's own watch is for the server that forks workers, which outlives a killed trainer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the trainer, which saves first
    environment.restore(values)


def _as_is(outcome: Any) -> Any:
    return outcome


def _parts(global_batch: int, ranks: int, micro_batch: int | None) -> int:
    if micro_batch is None:
        return 1
    parts, left = divmod(global_batch, ranks * micro_batch)
    if left or not parts:
        raise UserError(
            f"a global batch of {global_batch} is no whole number of micro-batches of {micro_batch} on {ranks} ranks",
            where="data.global_batch",
            expected=f"a multiple of {ranks * micro_batch}",
        )
    return parts
