"""Losses and reports between two log lines: gathered on the device, read on the host once in a while."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crossgate.errors import UserError
from crossgate.training.world import World

LOSS = "loss"


class Window:
    """Keeps references to the scalars of each micro-batch; only `settle` waits for the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: list[tuple[int, Sequence[str], dict[str, Tensor]]] = []
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # name -> sum, count

    def add(self, step: int, keys: Sequence[str], loss: Tensor, report: Mapping[str, Tensor]) -> None:
        """Notes the scalars of a micro-batch without reading them."""
        self._pending.append((step, keys, {LOSS: loss.detach(), **report}))

    def settle(self) -> None:
        """Reads what is pending. Every rank calls it at the same steps.

        Raises:
            UserError: for a loss that is not finite on any rank, naming the clips of that batch.
        """
        bad: tuple[int, Sequence[str]] | None = None
        for (step, keys, scalars), values in zip(self._pending, self._read(), strict=True):
            for name, value in zip(scalars, values, strict=True):
                if name == LOSS and not math.isfinite(value) and bad is None:
                    bad = step, keys
                if math.isfinite(value):  # a report may have nothing to say about a batch: NaN
                    entry = self._sums[name]
                    entry[0], entry[1] = entry[0] + value, entry[1] + 1
        self._pending.clear()
        found = [entry for entry in self._world.gather(bad) if entry is not None]
        if found:
            raise _not_finite(found)

    def read(self) -> dict[str, float]:
        """Returns the mean of every scalar over micro-batches and ranks, as ``train/NAME``, and starts anew."""
        self.settle()
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in self._world.gather(dict(self._sums)):
            for name, (value, count) in part.items():
                totals[name][0] += value
                totals[name][1] += count
        self._sums.clear()
        return {f"train/{name}": value / count for name, (value, count) in totals.items()}

    def _read(self) -> list[list[float]]:
        """Returns the pending scalars as numbers, in one transfer."""
        scalars = [tensor.reshape(()).float() for _, _, part in self._pending for tensor in part.values()]
        numbers = iter(torch.stack(scalars).tolist() if scalars else ())
        return [[next(numbers) for _ in part] for _, _, part in self._pending]


def _not_finite(found: Sequence[tuple[int, Sequence[str]]]) -> UserError:
    first = min(step for step, _ in found)
    keys = [key for step, part in found if step == first for key in part]
    named = ", ".join(keys[:16]) + (f" and {len(keys) - 16} more" if len(keys) > 16 else "")
    return UserError(
        f"loss is not finite at step {first}",
        where=f"clips {named}",
        cure="look at these clips with `crossgate preview`, or lower optim.lr; the last checkpoint is from before",
    )
