"""Brings batches to the device, on a GPU while it is still busy with the steps before."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

_AHEAD = 2


class Feed:
    """Copies batches over a stream of their own; on a CPU they are there already.

    The host asks for a batch while the device works on earlier ones, for nothing in a step waits for the device. A copy
    in the compute stream would stand behind their kernels all the same; in a stream of its own it runs beside them. No
    batch is taken from the loader before its step begins, so that its position is always that of the step.

    Args:
        device: where steps compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._asked: deque[torch.cuda.Event] = deque()

    def keep_pace(self) -> None:
        """Waits until the device has begun the last but one of the batches that it got.

        Memory of copied batches comes back only when their kernels are done: a host that ran ahead freely would fill
        the device with them. Call it before a batch is asked for.
        """
        if self._copies is None:
            return
        self._asked.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._asked) > _AHEAD:
            self._asked.popleft().synchronize()

    def to_device(self, batch: Any) -> Any:
        """Returns the batch on the device, ready for kernels of the current stream."""
        if self._copies is None:
            return batch
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            moved = batch.pin_memory().to(self._device)
        compute.wait_stream(self._copies)
        moved.used_by(compute)
        return moved
