"""What keeps a gate from collapse: the load balance of a sparse one, and the entropy of any."""

from __future__ import annotations

import torch
from torch import Tensor

from crossgate.objectives.gather import global_loss, sum_over_ranks


def load_balance(weights: Tensor, routing: Tensor, present: Tensor) -> Tensor:
    """Returns how unevenly the clips of the global batch use their modalities; 1 when evenly, up to M.

    ``L = (1/N) sum_m F_m P_m / U_m``: over the N clips that have anything, ``F_m`` sums the hard weights, ``P_m`` the
    soft ones, ``U_m`` what equal shares of each clip's modalities would be. Where all clips have all M modalities, it
    is the loss of Switch transformers (Fedus et al. 2022, arXiv 2101.03961, equation 4).

    Args:
        weights: ``(B, M)`` hard weights; no gradient passes through them.
        routing: ``(B, M)`` soft weights.
        present: ``(B, M)`` bool, what the gate could choose from.

    Returns:
        0-d; 0 without clips. Its gradient, averaged over ranks, is that of the global batch.
    """
    routing = routing.to(torch.promote_types(routing.dtype, torch.float32))
    equal = present.to(routing) / present.sum(1, keepdim=True).clamp(min=1)
    facts = torch.stack([weights.detach().to(routing).sum(0), routing.detach().sum(0), equal.sum(0)])
    hard, soft, fair = sum_over_ranks(facts)  # (M,) each
    clips = fair.sum().clamp(min=1)  # every clip that has anything adds 1
    slope = hard / torch.where(fair > 0, fair, torch.ones_like(fair)) / clips
    return global_loss((slope * routing.sum(0)).sum(), (slope * soft).sum())


def concentration(weights: Tensor, present: Tensor) -> Tensor:
    """Returns how far a gate's weights are from even, over the clips of the global batch that leave it a choice.

    The mean of ``1 - H(g) / log n`` over the clips that have n > 1 modalities, H Shannon's entropy: 0 when even, 1 when
    all is on one. The confidence penalty of Pereyra et al. 2017 (arXiv 1701.06548), on weights instead of classes.

    Args:
        weights: ``(B, M)``, summing to 1 over what is present.
        present: ``(B, M)`` bool, what the gate could choose from.

    Returns:
        0-d; 0 without such clips. Its gradient, averaged over ranks, is that of the global batch.
    """
    exact = weights.to(torch.promote_types(weights.dtype, torch.float32))
    count = present.sum(1)  # (B,)
    safe = torch.where(exact > 0, exact, torch.ones_like(exact))  # 0 log 0 is 0, its gradient would be infinite
    even = -(safe * safe.log()).sum(1) / count.clamp(min=2).to(exact).log()
    local = (1 - even).masked_fill(count < 2, 0).sum()
    total, clips = sum_over_ranks(torch.stack([local.detach(), (count > 1).sum().to(exact)]))
    return global_loss(local / clips.clamp(min=1), total / clips.clamp(min=1))
