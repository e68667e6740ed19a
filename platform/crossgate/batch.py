"""What travels from the loader to a task: some clips as tensors, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class ClipBatch:
    """B clips of M modalities (in the order of `modality.MODALITIES`).

    Attributes:
        modalities: names, length M; the order of every M axis here.
        streams: modality -> ``(B, T, C, H, W)``; rgb as uint8, the others as float. Rows of absent clips are zeros
            that `present` tells the network to ignore.
        present: ``(B, M)`` bool.
        group: ``(B,)`` int64, a 63-bit hash of the group's name.
        labels: task name -> ``(B,)`` int64 class in the index's vocabulary, -1 where the clip has no such label.
        degraded: ``(B, M)`` float32, the known severity of degradation in 0..1, NaN where nothing is known.
        clip: ``(B,)`` int64, the clip's ordinal in its index; those of further corpora count on.
        keys: names of the clips, length B, for messages.
    """

    modalities: tuple[str, ...]
    streams: dict[str, Tensor]
    present: Tensor
    group: Tensor
    labels: dict[str, Tensor]
    degraded: Tensor
    clip: Tensor
    keys: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.present.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ClipBatch:
        """Returns the batch with its tensors on the device."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        """Returns the batch in page-locked memory, for overlapped copies to a GPU."""
        return self._each(lambda x: x.pin_memory())

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keeps the tensors' memory from other use until the stream has done what it was given so far."""

        def keep(x: Tensor) -> Tensor:
            x.record_stream(stream)
            return x

        self._each(keep)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ClipBatch:
        return replace(
            self,
            streams={name: change(x) for name, x in self.streams.items()},
            present=change(self.present),
            group=change(self.group),
            labels={name: change(x) for name, x in self.labels.items()},
            degraded=change(self.degraded),
            clip=change(self.clip),
        )

    def select(self, rows: Tensor | slice) -> ClipBatch:
        """Returns some of the clips: a slice, or ``(N,)`` int64 positions."""
        chosen = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows.tolist()
        return ClipBatch(
            modalities=self.modalities,
            streams={name: x[rows] for name, x in self.streams.items()},
            present=self.present[rows],
            group=self.group[rows],
            labels={name: x[rows] for name, x in self.labels.items()},
            degraded=self.degraded[rows],
            clip=self.clip[rows],
            keys=[self.keys[row] for row in chosen] if self.keys else [],
        )

    @staticmethod
    def concatenate(batches: Sequence[ClipBatch]) -> ClipBatch:
        """Returns the clips of one batch or more, of the same modalities and tasks, in one."""
        first = batches[0]
        return ClipBatch(
            modalities=first.modalities,
            streams={name: torch.cat([batch.streams[name] for batch in batches]) for name in first.streams},
            present=torch.cat([batch.present for batch in batches]),
            group=torch.cat([batch.group for batch in batches]),
            labels={name: torch.cat([batch.labels[name] for batch in batches]) for name in first.labels},
            degraded=torch.cat([batch.degraded for batch in batches]),
            clip=torch.cat([batch.clip for batch in batches]),
            keys=[key for batch in batches for key in batch.keys],
        )
