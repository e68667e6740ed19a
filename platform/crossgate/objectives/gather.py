"""Collectives for losses over the global batch.

The rule that keeps the maths the same on any number of ranks: each rank computes its own clips' share of the
*global* loss (normalised by global counts), multiplies it by the number of ranks and lets gradients flow back through
`gather`. The trainer averages gradients over ranks, which then equals the gradient of the global loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """Returns the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's rank, 0 without a process group."""
    return dist.get_rank() if ranks() > 1 else 0


class _Gather(torch.autograd.Function):
    """Concatenates over ranks; the gradient of a rank's part is the sum of all ranks' gradients for it."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(ranks())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        start = rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather(local: Tensor) -> Tensor:
    """Returns the rows of all ranks in rank order, ``(B, ...) -> (ranks * B, ...)``, with gradient.

    B must be the same on every rank.
    """
    return local if ranks() == 1 else _Gather.apply(local.contiguous())


def sum_over_ranks(local: Tensor) -> Tensor:
    """Returns the sum of a tensor over ranks, without gradient."""
    total = local.detach().clone()
    if ranks() > 1:
        dist.all_reduce(total)
    return total


def pair_mean(local_sums: Tensor, global_sums: Tensor, counts: Tensor) -> Tensor:
    """Returns `global_loss` of the mean over pairs of each pair's mean; pairs without anything to average are left out.

    Args:
        local_sums: ``(P,)`` this rank's sums, with gradient.
        global_sums: ``(P,)`` those of all ranks.
        counts: ``(P,)`` how many all ranks summed.
    """
    divisor = counts.clamp(min=1) * (counts > 0).sum().clamp(min=1)
    return global_loss((local_sums / divisor).sum(), (global_sums / divisor).sum())


def global_loss(local_share: Tensor, global_value: Tensor) -> Tensor:
    """Returns the loss to give to the trainer: its value is the global loss, its gradient, averaged over ranks, too.

    Args:
        local_share: 0-d, this rank's summand of the global loss, with gradient.
        global_value: 0-d, the sum of all ranks' shares.
    """
    scaled = local_share * ranks()
    return scaled + (global_value - scaled).detach()
