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
    factor belongs on the gradient at the encoder's output, from where the chain rule takes it to every kind of weight.

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


def gradient_noise(slope: Tensor, present: Tensor, draws: Tensor) -> Tensor:
    """Returns Gaussian noise as strong as the gradient itself: each modality's has its own standard deviation.

    Generalisation enhancement (Peng et al. 2022, section 3.4), at the encoder's output instead of at each weight: there
    it reaches every kind of weight, and in the directions in which clips move weights, as the noise of small batches
    does that it stands for.

    Args:
        slope: ``(B, M, D)`` gradient of features, this rank's clips.
        present: ``(B, M)`` bool; what is absent gets no noise.
        draws: ``(B, M * D)`` uniform in 0..1, of `clip_draws`: alike on any number of ranks.
    """
    exact = slope.to(torch.promote_types(slope.dtype, torch.float32)).masked_fill(~present.unsqueeze(2), 0)
    count = present.sum(0).to(exact) * slope.shape[2]
    total, squares, count = sum_over_ranks(torch.stack([exact.sum((0, 2)), exact.square().sum((0, 2)), count]))
    count = count.clamp(min=1)
    deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()  # (M,)
    inside = draws.double() + 2**-25  # never 0 nor 1, where a normal variable would be infinite
    normal = (2**0.5 * torch.erfinv(2 * inside - 1)).view_as(slope)
    return (deviation.view(1, -1, 1) * normal).masked_fill(~present.unsqueeze(2), 0).to(slope.dtype)
