"""What a run costs: clips/s, data-wait, step times, memory, MFU. Nothing here touches the device in a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import torch

GIB = 1 << 30

# Dense bf16 peaks in FLOP/s from the makers' data sheets (figures with 2:4 sparsity are twice these).
_BF16_PEAKS = {
    "A100": 312e12,
    "A10G": 70e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns the dense peak of the device in FLOP/s, or None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    # Whole words: "L40" is no L4. Other cards are told apart by further words, so the longest name wins.
    words = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    known = [name for name in _BF16_PEAKS if f" {name} " in words]
    return _BF16_PEAKS[max(known, key=len)] if known else None


class Meters:
    """Times of one rank between two log lines. Validation and saving are not counted as steps.

    Args:
        clips_per_step: clips of one step over all ranks.
        flops_per_step: FLOPs of one step on this rank, if they were counted.
    """

    def __init__(
        self,
        clips_per_step: int,
        ranks: int,
        device: torch.device,
        *,
        precision: str = "fp32",
        flops_per_step: float | None = None,
    ) -> None:
        self._clips, self._ranks, self._device = clips_per_step, ranks, device
        self._peak = peak_flops(device, precision)
        self.flops_per_step = flops_per_step
        self._recent: list[float] = []  # the last thousand steps, for an ETA that survives short windows
        self.start()

    def start(self) -> None:
        """Starts counting anew, from now."""
        self._steps: list[float] = []
        self._waited = 0.0
        self._mark = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time within out of the count."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def step(self) -> None:
        """Ends a step."""
        now = time.perf_counter()
        self._steps.append(now - self._mark)
        self._mark = now

    def read(self) -> dict[str, float]:
        """Returns the meters since the last reading, by names that carry their units, and starts anew."""
        steps = np.asarray(self._steps)
        self._recent = (self._recent + self._steps)[-1000:]
        per_step = float(steps.mean())
        metrics = {
            "throughput/clips_per_s": self._clips / per_step,
            "throughput/clips_per_s_per_rank": self._clips / per_step / self._ranks,
            "time/step_s_p50": float(np.quantile(steps, 0.5)),
            "time/step_s_p95": float(np.quantile(steps, 0.95)),
            "time/data_wait_pct": 100 * min(self._waited / float(steps.sum()), 1.0),
            "memory/host_gib": psutil.Process().memory_info().rss / GIB,
        }
        if self._device.type == "cuda":
            metrics["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
        if self._peak and self.flops_per_step:
            metrics["throughput/mfu_pct"] = 100 * self.flops_per_step / per_step / self._peak
        self.start()
        return metrics

    def eta_s(self, steps_left: int) -> float:
        """Returns the seconds that the steps left will take at the recent pace."""
        return steps_left * float(np.mean(self._recent)) if self._recent else float("nan")
