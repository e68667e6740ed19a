"""Losses of pretext tasks, weighed clip by clip: by a gate that learns and cannot fall for the easiest task.

Gated self-supervision (Fuadi et al. 2023, arXiv 2301.05865; Ruslim et al. 2023, arXiv 2307.14897) adds
``sum_k g_k L_k`` with ``g = softmax(W x)``. Its published code takes the weights out of the graph: W never learns. With
the gradient, the smallest loss takes everything, since nothing else is asked of g. Here a clip's loss is::

    l = sum_k g_k l_k + beta (log n - H(g))        l_k = cross entropy of task k / log(its classes)

over the n tasks that the clip can be asked. Its best gate is ``g_k ~ exp(-E[l_k | x] / beta)``: a guessed task counts
less than a solved one, by ``exp(1 / beta)``, and never nothing. The published weights are the batch's mean; each clip
keeps its own here, so that what one lacks weighs nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossgate.objectives.gather import global_loss, sum_over_ranks


def task_losses(logits: list[Tensor], labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a task's loss of each clip ``(B,)``, 1 where it is guessed, and which clips could be asked ``(B,)``.

    Args:
        logits: for each modality that is asked, ``(B, K)``.
        labels: ``(B,)`` int64.
        valid: ``(B, modalities)`` bool; the loss is the mean over those.
    """
    stacked = torch.stack(logits, dim=1)  # (B, modalities, K)
    exact = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
    targets = labels.unsqueeze(1).expand(-1, exact.shape[1])
    losses = torch.nn.functional.cross_entropy(exact.transpose(1, 2), targets, reduction="none") / math.log(
        exact.shape[2]
    )
    return losses.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1), valid.any(1)


def weigh(losses: Tensor, asked: Tensor, scores: Tensor | None, evenness: float) -> tuple[Tensor, Tensor]:
    """Mixes the tasks' losses over the clips of the global batch.

    Args:
        losses: ``(B, K)``, of K tasks.
        asked: ``(B, K)`` bool, which clip could be asked what.
        scores: ``(B, K)`` of the gate; None: equal weights.
        evenness: beta; 0 for a gate that does not learn.

    Returns:
        The mean loss of the clips that could be asked anything, 0 without any, whose gradient, averaged over ranks, is
        that of the global batch; and the weights ``(B, K)`` without gradient, zeros for a clip that could not.
    """
    count = asked.sum(1, keepdim=True)  # (B, 1)
    scores = torch.zeros_like(losses) if scores is None else scores.to(losses.dtype)
    some = asked | (count == 0)  # a softmax over nothing would be NaN
    logs = scores.masked_fill(~some, -torch.inf).log_softmax(1).masked_fill(~asked, 0)
    weights = logs.exp().masked_fill(~asked, 0)
    uneven = count.squeeze(1).clamp(min=1).to(losses).log() + (weights * logs).sum(1)  # KL from equal weights
    clips = (weights * losses).sum(1) + evenness * uneven
    local = clips.masked_fill(count.squeeze(1) == 0, 0).sum()
    total, number = sum_over_ranks(torch.stack([local.detach(), (count > 0).sum().to(local)]))
    return global_loss(local / number.clamp(min=1), total / number.clamp(min=1)), weights.detach()
