"""Losses and reports between two log lines: gathered on the device, read on the host once in a while."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crossgate.training.nonfinite import BadStep
from crossgate.training.world import World

LOSS, LEFT_OUT = "loss", "left_out"


class Window:
    """Keeps references to the scalars of each micro-batch; only `settle` waits for the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: list[tuple[int, Sequence[str], dict[str, Tensor]]] = []
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # name -> sum, count

    def add(self, step: int, keys: Sequence[str], loss: Tensor, report: Mapping[str, Tensor]) -> None:
        """Notes the scalars of a micro-batch without reading them."""
        self._pending.append((step, keys, {LOSS: loss.detach(), **report}))

    def end_step(self, left_out: Tensor) -> None:
        """Notes whether the step that the last micro-batch belongs to was left out: 0-d, not 0 if so."""
        self._pending[-1][2][LEFT_OUT] = left_out

    def settle(self) -> list[BadStep]:
        """Reads what is pending. Every rank calls it at the same steps.

        Returns:
            The steps that were left out, or whose loss is not finite on any rank, with their clips; alike on all ranks.
        """
        keys_of: dict[int, list[str]] = defaultdict(list)
        own: dict[int, list[str]] = {}  # step that is bad for this rank -> clips whose loss is
        for (step, keys, scalars), values in zip(self._pending, self._read(), strict=True):
            keys_of[step] += keys
            for name, value in zip(scalars, values, strict=True):
                if name == LOSS and not math.isfinite(value):
                    own.setdefault(step, []).extend(keys)
                elif name == LEFT_OUT:
                    if value:
                        own.setdefault(step, [])
                elif math.isfinite(value):  # a report may have nothing to say about a batch: NaN
                    entry = self._sums[name]
                    entry[0], entry[1] = entry[0] + value, entry[1] + 1
        self._pending.clear()
        return self._agreed({step: (clips, keys_of[step]) for step, clips in own.items()})

    def _agreed(self, own: dict[int, tuple[list[str], list[str]]]) -> list[BadStep]:
        """Returns the bad steps of all ranks, with the clips whose loss is at fault, or else all of the step."""
        of_ranks = self._world.gather(own)
        bad = []
        for step in sorted(set().union(*of_ranks)):
            guilty = [key for part in of_ranks for key in part.get(step, ((), ()))[0]]
            everyone = [key for part in of_ranks for key in part.get(step, ((), ()))[1]]
            bad.append(BadStep(step, tuple(guilty or everyone)))
        return bad

    def read(self) -> dict[str, float]:
        """Returns the mean of every settled scalar over micro-batches and ranks, as ``train/NAME``, and starts anew."""
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in self._world.gather(dict(self._sums)):
            for name, (value, count) in part.items():
                totals[name][0] += value
                totals[name][1] += count
        self._sums.clear()
        means = {f"train/{name}": value / count for name, (value, count) in totals.items()}
        return {f"train/{LOSS}": math.nan} | means  # where every step was left out

    def _read(self) -> list[list[float]]:
        """Returns the pending scalars as numbers, in one transfer."""
        scalars = [tensor.reshape(()).float() for _, _, part in self._pending for tensor in part.values()]
        numbers = iter(torch.stack(scalars).tolist() if scalars else ())
        return [[next(numbers) for _ in part] for _, _, part in self._pending]
