"""A step over several micro-batches: one after the other, or as one contrast over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crossgate.training.driver import spoiling
from crossgate.training.randomness import device_random_state, set_device_random_state

Scores = tuple[Tensor, dict[str, Tensor]]


def contrasts(task: Any) -> bool:
    """Whether the task's loss is of the global batch as a whole, so that micro-batches cannot be scored apart."""
    return hasattr(task, "encode")


def step_as_one(engine: Any, batches: Sequence[Any], forward: Callable[..., Any]) -> Scores:
    """Takes one optimiser step whose gradient is that of the undivided batch; memory is that of one micro-batch.

    GradCache (Gao et al. 2021, arXiv 2101.06983): encode every micro-batch without keeping activations, score all of
    them at once, take the gradient down to the embeddings, then encode each again and send its part of that gradient
    on. Second encodings see the random numbers of the first, so that dropout hides the same.

    Args:
        engine: a `Driver` over a task with `encode` and `score`.
        batches: this rank's micro-batches, on its device.
        forward: ``(batch, encode=True)`` by way of the engine.

    Returns:
        Loss and report of the global batch.
    """
    module, task = engine.module, engine.module.task
    counted = task.forwards.clone()
    states, parts = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(device_random_state())
            parts.append(module(batch, encode=True))
    after = device_random_state()
    whole = type(parts[0]).joined(parts)
    with module.autocast():
        loss, report = task.score(whole)
    spoiling(loss).backward()
    task.forwards.copy_(counted)
    start = 0
    for batch, state, part in zip(batches, states, parts):
        set_device_random_state(state)
        encoded = forward(batch, encode=True)
        engine.backward(encoded.surrogate(whole, start, len(batches)) * len(batches))  # which it divides by as many
        engine.step()
        start += len(part)
    set_device_random_state(after)
    return loss.detach().reshape(()), report
