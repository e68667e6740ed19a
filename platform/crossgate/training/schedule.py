"""Learning rate as a function of the step alone, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from crossgate.config import OptimConfig


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Returns the share of the peak learning rate that step 1..steps uses.

    Linear warm-up over `optim.warmup` of all steps, then half a cosine down to `optim.final_lr` (Loshchilov and
    Hutter 2017, SGDR, eq. 5 with one cycle) at the last step.
    """
    warmup = round(optim.warmup * steps)
    if step <= warmup:
        return step / max(warmup, 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class LearningRates:
    """Sets every parameter group's rate for a step; the groups keep their ratios."""

    def __init__(self, optimizer: Optimizer, steps: int, optim: OptimConfig) -> None:
        self._optimizer, self._steps, self._optim = optimizer, steps, optim
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Sets the rates of this step and returns the one of a group that runs at `optim.lr`."""
        factor = lr_factor(step, self._steps, self._optim)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return self._optim.lr * factor
