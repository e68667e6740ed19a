"""What keeps one modality from learning at the cost of the others: modulated gradients, blended losses."""

from __future__ import annotations

import torch
from torch import Tensor

from crossgate.objectives.gather import sum_over_ranks


def modulation(logits: Tensor, labels: Tensor, valid: Tensor, strength: float) -> Tensor:
    """Returns the factor of each modality's gradient: below 1 for one that is ahead of the others, 1 for the rest.

    On-the-fly gradient modulation (Peng et al. 2022, arXiv 2203.15332, equations 8 to 10), for M modalities: ``s_m`` is
    the mean probability that the head of m gives the true class, over the clips of the global batch that have m;
    ``rho_m = s_m / mean of the others' s_j``; ``k_m = 1 - tanh(strength * rho_m)`` where ``rho_m > 1``, else 1. The
    factor belongs on the gradient at the encoder's output, from where the chain rule takes it to every kind of weight;
    the noise that the paper adds to the gradients (GE) is left out.

    Args:
        logits: ``(B, M, K)`` of the unimodal heads.
        labels: ``(B,)`` int64, -1 for none.
        valid: ``(B, M)`` bool, who has what.
        strength: alpha; 0 changes nothing.

    Returns:
        ``(M,)`` without gradient, alike on all ranks.
    """
    exact = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    target = labels.clamp(min=0).view(-1, 1, 1).expand(-1, exact.shape[1], 1)
    known = valid & (labels >= 0).unsqueeze(1)
    true = exact.gather(2, target).squeeze(2).masked_fill(~known, 0)  # (B, M)
    sums, counts = sum_over_ranks(torch.stack([true.sum(0), known.sum(0).to(true)]))
    there = counts > 0
    mean = sums / counts.clamp(min=1)  # (M,), 0 where nobody has the modality
    others = (mean.sum() - mean) / (there.sum() - there.to(mean)).clamp(min=1)
    ahead = torch.where(others > 0, mean / others, torch.zeros_like(mean))
    return torch.where(ahead > 1, 1 - torch.tanh(strength * ahead), torch.ones_like(ahead))
