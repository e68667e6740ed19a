"""The engine as the loop drives it: each part of a step announced, clipped without a look, known to have counted.

DeepSpeed reads the gradient's norm on the host in every step, to see whether it is finite and to clip by it; the device
then stands still until the host has given it the next step's work. PyTorch's fused AdamW takes both as tensors, the way
its own `GradScaler` hands them over: a divisor of the gradient, and a flag that makes a step change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from crossgate.config import Recipe
from crossgate.training.engine import clips_by_itself
from crossgate.training.world import World

Part = Literal["forward", "backward", "step"]


def spoiling(loss: Tensor) -> Tensor:
    """Returns the loss, with a gradient that is not finite where the loss itself is not: so its step is left out."""
    return loss * (1 + 0 * loss.detach())


class Driver:
    """A DeepSpeed engine that says what it does.

    Args:
        engine: of `build_engine`.
        recipe: that it was built by.
        world: the ranks, over which ZeRO spreads the gradient.
        begin: is told what begins.

    Attributes:
        module: the engine's.
        left_out: 0-d, 1 if the last step was left out on all ranks, since its gradient was not finite on some rank;
            else 0. Overflows of fp16 are no such thing: there the scale of losses is being sought.
    """

    def __init__(self, engine: Any, recipe: Recipe, world: World, begin: Callable[[Part], None]) -> None:
        self._engine, self._world, self._begin = engine, world, begin
        self._ours, self._scaled = clips_by_itself(recipe.engine), recipe.engine.precision == "fp16"
        self._clip_norm = recipe.optim.clip_norm
        self._norm: Tensor | None = None
        self.module = engine.module
        self.left_out = torch.zeros(())

    def __call__(self, batch: Any, **how: bool) -> Any:
        """Runs the task on a micro-batch."""
        self._begin("forward")
        return self._engine(batch, **how)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch."""
        self._begin("backward")
        self._engine.backward(spoiling(loss))

    def step(self) -> None:
        """Ends a micro-batch; after the last one of a step the weights change. Every rank calls it."""
        self._begin("step")
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        elif self._ours:
            self._clip()
            self._engine.step()
        else:
            self._engine.step()
            self.left_out = torch.tensor(
                float(not (self._engine.was_step_applied() or self._scaled)), device=self._world.device
            )

    def grad_norm(self) -> float | None:
        """Returns the norm of the last step's gradient before it was clipped; waits for the device."""
        norm = self._norm if self._ours else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _clip(self) -> None:
        """Tells the optimiser what to divide the gradient by, and whether to leave it alone."""
        adam: Any = (
            self._engine.optimizer.optimizer if self._engine.zero_optimization_stage() else self._engine.optimizer
        )
        self._norm = self._measured()
        adam.found_inf = self.left_out = (~self._norm.isfinite()).float()
        if self._clip_norm:
            adam.grad_scale = ((self._norm + 1e-6) / self._clip_norm).clamp(min=1.0)

    def _measured(self) -> Tensor:
        """The norm of the gradient that the next step takes, over all ranks."""
        if self._engine.zero_optimization_stage() == 0:  # every rank has all of it
            return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        own = [part for group in self._engine.optimizer.averaged_gradients.values() for part in group or ()]
        squared = torch.nn.utils.get_total_norm(own).to(self._world.device).float().square()
        if self._world.ranks > 1:
            dist.all_reduce(squared)
        return squared.sqrt()
