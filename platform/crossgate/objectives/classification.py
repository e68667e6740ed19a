"""Cross entropy over the global batch, for clips of which some have no label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossgate.objectives.gather import global_loss, sum_over_ranks


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns, per column of logits, the mean loss of the valid clips of the global batch.

    Args:
        logits: ``(B, H, K)``: H heads that score the same clips.
        labels: ``(B,)`` int64, -1 for none.
        valid: ``(B, H)`` bool, which head may be judged on which clip.
        class_weights: ``(K,)``; the mean is then the weighted one, as torch's.
        label_smoothing: as torch's.

    Returns:
        ``(H,)``; 0 for a head that has no valid clip anywhere. Its gradient, averaged over ranks, is that of the
        global mean.
    """
    heads = logits.shape[1]
    valid = valid & (labels >= 0).unsqueeze(1)  # (B, H)
    targets = labels.clamp(min=0).unsqueeze(1).expand(-1, heads)  # (B, H)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if class_weights is not None:
        class_weights = class_weights.to(exact)
    losses = nn.functional.cross_entropy(
        exact.transpose(1, 2),
        targets,
        weight=class_weights,
        label_smoothing=label_smoothing,
        reduction="none",
    )  # (B, H)
    mass = torch.ones_like(losses) if class_weights is None else class_weights[targets]
    local = losses.masked_fill(~valid, 0).sum(0)  # (H,)
    sums, masses = sum_over_ranks(torch.stack([local.detach(), mass.masked_fill(~valid, 0).sum(0)]))
    divisor = torch.where(masses > 0, masses, torch.ones_like(masses))
    return global_loss(local / divisor, sums / divisor)
