"""Fetched clips -> one `ClipBatch`, decoded straight into the batch's memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from crossgate.batch import ClipBatch
from crossgate.config import AugmentConfig, CacheConfig, ClipConfig
from crossgate.errors import UserError
from crossgate.stream.index import Index
from crossgate.stream.plan import Unit
from crossgate.stream.reader import ClipReader, FetchedClip
from crossgate.stream.schedule import clip_seed

Decode = Callable[[Mapping[str, bytes], ClipConfig, AugmentConfig | None, int], dict[str, Tensor]]
"""Members of a clip -> modality -> ``(T, C, H, W)``, present modalities only."""


def default_decode() -> Decode:
    """Returns `clips.tensors.clip_tensors`; video libraries are loaded only where clips are decoded."""
    from crossgate.clips.tensors import clip_tensors

    return clip_tensors


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be used, and why."""

    clip: int
    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"clip {self.key!r} of {self.shard}: {self.reason}"


@dataclass
class Outcome:
    """What a worker hands over: a batch with its account, or the error that stops the run."""

    batch: ClipBatch | None = None
    bad: list[BadClip] = field(default_factory=list)
    traffic: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: UserError | None = None

    def pin_memory(self) -> Outcome:
        """Returns it with the batch in page-locked memory."""
        return replace(self, batch=self.batch and self.batch.pin_memory())


class Collator:
    """Makes the batch of a unit. One a process, made on first use there.

    Args:
        indices: of the corpora; the first one's vocabularies number the labels.
        clip: shapes of the tensors.
        augment: None for evaluation.
        seed: of the run; a clip's own seed is a function of it, the clip's ordinal and the epoch.
        decode: the codec.
        cache: where whole shards of a remote store are kept.
    """

    def __init__(
        self,
        indices: Sequence[Index],
        clip: ClipConfig,
        augment: AugmentConfig | None,
        seed: int,
        decode: Decode,
        cache: CacheConfig | None = None,
    ) -> None:
        self.clip, self.augment, self.seed, self.decode = clip, augment, seed, decode
        self.vocabularies = indices[0].vocabularies
        ends = np.cumsum([int(index.clips.sum()) for index in indices]).tolist()
        self.readers = [
            ClipReader(index, clip.modalities, cache, vocabularies=self.vocabularies, first=first)
            for index, first in zip(indices, [0, *ends])
        ]

    def fetch(self, unit: Unit) -> list[FetchedClip]:
        """Reads a unit's clips; several threads may."""
        if len(self.readers) == 1:
            return self.readers[0].fetch(unit.shards, unit.rows)
        clips: dict[int, FetchedClip] = {}
        for corpus, reader in enumerate(self.readers):
            (places,) = np.nonzero(unit.corpora == corpus)
            clips |= zip(places.tolist(), reader.fetch(unit.shards[places], unit.rows[places]))
        return [clips[place] for place in range(len(clips))]

    def close(self) -> None:
        """Ends the readers' threads."""
        for reader in self.readers:
            reader.close()

    def collate(self, clips: list[FetchedClip], epochs: Sequence[int]) -> Outcome:
        """Decodes clips, each drawn for a pass of its corpus, into one batch.

        A clip that cannot be decoded keeps its row, with every modality absent and every label -1, so that all ranks
        take the same steps with the same batch sizes; the outcome names it.
        """
        batch = self._empty(clips)
        bad = []
        for row, clip in enumerate(clips):
            reason = clip.error or self._decode_into(batch, row, clip, epochs[row])
            if reason:
                bad.append(BadClip(clip.clip, clip.key, clip.shard, reason))
                batch.present[row] = False
                for labels in batch.labels.values():
                    labels[row] = -1
            for column, name in enumerate(batch.modalities):
                if not batch.present[row, column]:
                    batch.streams[name][row] = 0
        traffic: Counter[str] = Counter()
        for reader in self.readers:
            traffic.update(reader.traffic())
        notes = [note for reader in self.readers if reader.cache for note in reader.cache.notes]
        return Outcome(batch, bad, dict(traffic), notes)

    def _empty(self, clips: list[FetchedClip]) -> ClipBatch:
        """A batch whose streams hold anything: writing zeros first would cost as much as writing the clips."""
        size, names = len(clips), self.clip.modalities
        return ClipBatch(
            modalities=names,
            streams={
                name: torch.empty((size, *self.clip.shape(name)), dtype=torch.uint8 if name == "rgb" else torch.float32)
                for name in names
            },
            present=torch.zeros((size, len(names)), dtype=torch.bool),
            group=torch.tensor([clip.group for clip in clips], dtype=torch.int64),
            labels={
                task: torch.tensor([clip.labels[task] for clip in clips], dtype=torch.int64)
                for task in self.vocabularies
            },
            degraded=torch.from_numpy(np.stack([clip.degraded for clip in clips]).astype(np.float32)),
            clip=torch.tensor([clip.clip for clip in clips], dtype=torch.int64),
            keys=[clip.key for clip in clips],
        )

    def _decode_into(self, batch: ClipBatch, row: int, clip: FetchedClip, epoch: int) -> str:
        """Fills a row; returns why that failed, or nothing."""
        try:
            seed = clip_seed(self.seed, clip.clip, epoch)
            tensors = self.decode(clip.members or {}, self.clip, self.augment, seed)
            for column, name in enumerate(batch.modalities):
                if name in tensors:
                    into = batch.streams[name][row]
                    if tensors[name].shape != into.shape:
                        return f"{name} decodes to {tuple(tensors[name].shape)}, expected {tuple(into.shape)}"
                    into.copy_(tensors[name])
                    batch.present[row, column] = True
        except MemoryError:
            raise
        except Exception as error:  # whatever a broken file makes a codec do, it is this clip's fault alone
            return f"{type(error).__name__}: {error}".replace("\n", " ")
        return ""
