"""VICReg across modalities: agreement without negatives, kept from collapse by variance and decorrelation."""

from __future__ import annotations

import torch
from torch import Tensor

from crossgate.objectives.infonce import Contrast, Views

EPSILON = 1e-4


def vicreg(
    everywhere: Views,
    pairs: list[tuple[int, int]],
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Contrast:
    """Pulls the views of a clip together, and keeps each view's directions in use.

    For a pair (a, b), over the n clips of the global batch that have both (Bardes et al. 2022, arXiv 2105.04906,
    equations 1 to 6)::

        l_ab = 25 mean_i |a_i - b_i|^2 / E + 25 (v(a) + v(b)) + c(a) + c(b)
        v(a) = mean_d max(0, 1 - sqrt(var_d(a) + 1e-4))        c(a) = (1/E) sum_(d != e) cov_de(a)^2

    on embeddings of length sqrt(E), where each direction has variance 1 when all are used alike: the published loss is
    on vectors of free length. The loss is the mean over the pairs that two clips or more have.

    Args:
        everywhere: views of the global batch; their gradients reach the rank they came from.
        pairs: indices of views.
        invariance, variance, covariance: weights of the three parts.

    Returns:
        As `infonce`, without `top1` (NaN): nothing is ranked.
    """
    losses, exists = [], []
    with torch.autocast(everywhere.embeddings.device.type, enabled=False):
        exact = torch.promote_types(everywhere.embeddings.dtype, torch.float32)
        embeddings = everywhere.embeddings.to(exact) * everywhere.embeddings.shape[-1] ** 0.5
        for a, b in pairs:
            both = (everywhere.present[:, a] & everywhere.present[:, b]).unsqueeze(1)  # (N, 1)
            x, y = (embeddings[:, view].masked_fill(~both, 0) for view in (a, b))  # (N, E)
            apart = (x - y).square().mean(1).sum() / both.sum().clamp(min=1)
            (var_x, cov_x), (var_y, cov_y) = _spread(x, both), _spread(y, both)
            losses.append(invariance * apart + variance * (var_x + var_y) + covariance * (cov_x + cov_y))
            exists.append(both.sum() > 1)
    values, real = torch.stack(losses), torch.stack(exists)
    return Contrast(
        loss=values.masked_fill(~real, 0).sum() / real.sum().clamp(min=1),
        pair_losses=values.detach().masked_fill(~real, torch.nan),
        top1=values.new_full((), torch.nan),
    )


def _spread(x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns v and c of the counted rows of ``(N, E)``; the others hold zeros."""
    count = counted.sum()
    centred = (x - x.sum(0) / count.clamp(min=1)).masked_fill(~counted, 0)
    covariance = centred.T @ centred / (count - 1).clamp(min=1)  # (E, E)
    spread = covariance.diagonal()
    mixed = covariance.square().sum() - spread.square().sum()
    return torch.relu(1 - (spread + EPSILON).sqrt()).mean(), mixed / x.shape[1]
