"""SigLIP: every pair of clips is its own question, same clip or not; nothing is normalised over the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from crossgate.objectives.gather import pair_mean, rank, sum_over_ranks
from crossgate.objectives.infonce import Contrast, Views
from crossgate.objectives.tiles import tiles


def siglip(
    local: Views, everywhere: Views, pairs: list[tuple[int, int]], scale: Tensor, bias: Tensor, *, tile: int = 0
) -> Contrast:
    """Contrasts pairs of views by independent yes-or-no questions.

    ``l_ab = -(1/n) sum_(i, j) log sigmoid(z_ij (s <a_i, b_j> + bias))``, z is 1 for i = j and -1 else, over the n clips
    that have both views and all (i, j) of different groups that have a and b (Zhai et al. 2023, arXiv 2303.15343,
    equation 1). The loss is the mean over the pairs of views that have a positive.

    Args:
        local, everywhere, pairs, scale: as `infonce`.
        bias: 0-d; starts at about -10, so that the many negatives do not drown the start.
        tile: a global batch of more clips is made in tiles of that side, to the same result; 0: never.

    Returns:
        As `infonce`; `top1` counts view a's anchors only.
    """
    counts = torch.stack([(everywhere.present[:, a] & everywhere.present[:, b]).sum() for a, b in pairs])
    parts = [_pair(local, everywhere, a, b, scale, bias, tile) for a, b in pairs]
    sums = torch.stack([total for total, _ in parts]).masked_fill(counts == 0, 0)  # (P,)
    hits = torch.stack([hit for _, hit in parts])
    global_sums, global_hits = sum_over_ranks(torch.cat([sums.detach(), hits.to(sums.dtype)])).chunk(2)
    return Contrast(
        loss=pair_mean(sums, global_sums, counts),
        pair_losses=global_sums / counts,
        top1=global_hits.sum() / counts.sum(),
    )


def _pair(
    local: Views, everywhere: Views, a: int, b: int, scale: Tensor, bias: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """Returns the sum of this rank's answers, and how many of its anchors are nearest to their own positive."""
    total_clips, size = len(everywhere.group), len(local.group)
    step = tile if 0 < tile < total_clips else total_clips
    own = rank() * size + torch.arange(size, device=local.group.device)  # (B,)
    everyone = torch.arange(total_clips, device=own.device)
    largest = local.embeddings.new_full((size,), -torch.inf, dtype=torch.float64)
    best = torch.full_like(own, -1)
    sums = []
    with torch.autocast(local.embeddings.device.type, enabled=False):
        exact = torch.promote_types(local.embeddings.dtype, torch.float32)
        # Split once: the gradient of each slice would be as large as the whole.
        rows, columns = local.embeddings[:, a].to(exact).split(step), everywhere.embeddings[:, b].to(exact).split(step)
        for r, c in tiles(size, total_clips, step):
            same = own[r, None] == everyone[c]
            counted = same | (local.group[r, None] != everywhere.group[c])
            counted &= local.present[r, a, None] & everywhere.present[c, b]
            row, column = rows[r.start // step], columns[c.start // step]
            given = (row, column, scale.to(exact), bias.to(exact), same, counted)
            tiled = step < total_clips  # then nothing of a tile is kept for the way back
            answers, value, index = checkpoint(_tile, *given, use_reentrant=False) if tiled else _tile(*given)
            sums.append(answers)
            best[r] = torch.where(value > largest[r], index + c.start, best[r])
            largest[r] = torch.maximum(largest[r], value.double())
    both = local.present[:, a] & everywhere.present[own, b]
    return torch.stack(sums).sum(), ((best == own) & both).sum()


def _tile(
    row: Tensor, column: Tensor, scale: Tensor, bias: Tensor, same: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tile's sum of ``-log sigmoid`` and each row's nearest candidate: its similarity and its place."""
    similarity = scale * (row @ column.T) + bias
    answers = logsigmoid(torch.where(same, similarity, -similarity)).masked_fill(~counted, 0)
    value, index = similarity.detach().masked_fill(~counted, -torch.inf).max(dim=1)
    return -answers.sum(), value, index
