"""Cross-modal agreement: clips that two modalities both find alike are positives of each other, within each modality.

After AVID-CMA (Morgado et al. 2021, arXiv 2004.12943, section 3.3), with the clips of the global batch in the place of
its memory. For a pair of views (a, b), a clip i that has both, and the others C_i that have both and are of other
groups::

    P_i     = the k clips j of C_i with the largest min(<a_i, a_j>, <b_i, b_j>)
    l_aa(i) = -1/|P_i| sum_{j in P_i} s <a_i, a_j> + log sum_{j in J_i} exp(s <a_i, a_j>)
    J_i     = every clip that has view a and is of another group than i

The pair's loss is the mean of ``(l_aa + l_bb) / 2`` over the clips of the global batch that have a positive; the loss
is the mean over the pairs where there is such a clip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossgate.objectives.gather import pair_mean, sum_over_ranks
from crossgate.objectives.infonce import Views
from crossgate.objectives.tiles import tiles

_NOTHING = -1e30  # minus infinity would make the slope of an empty tile 0 / 0


def agreement(
    local: Views, everywhere: Views, pairs: list[tuple[int, int]], scale: Tensor, *, positives: int, tile: int = 0
) -> Tensor:
    """Returns the loss, 0-d; its gradient, averaged over ranks, is the global loss's.

    Memory grows with the tile and with this rank's clips times `positives`, not with the global batch squared.

    Args:
        local, everywhere, pairs, scale: as `infonce`.
        positives: k; fewer where fewer clips come into question.
        tile: clips whose similarities are taken at once; 0: all.
    """
    total_clips = len(everywhere.group)
    step = tile if 0 < tile < total_clips else total_clips
    sums, counts = [], []
    with torch.autocast(local.embeddings.device.type, enabled=False):
        exact = torch.promote_types(local.embeddings.dtype, torch.float32)
        mine = Views(local.embeddings.to(exact), local.present, local.group)
        all_ = Views(everywhere.embeddings.to(exact), everywhere.present, everywhere.group)
        views = {view for pair in pairs for view in pair}
        logsums = {view: _logsums(mine, all_, view, scale.to(exact), step) for view in sorted(views)}  # (B,) each
        for pair in pairs:
            chosen, found = agreeing(mine, all_, pair, positives, step)  # (B, k) each
            each = [logsums[view] - scale.to(exact) * _likeness(mine, all_, view, chosen, found) for view in pair]
            anchors = found.any(1)  # (B,)
            sums.append(torch.stack(each).mean(0).masked_fill(~anchors, 0).sum())
            counts.append(anchors.sum())
    local_sums = torch.stack(sums)  # (P,)
    everyone = sum_over_ranks(torch.cat([local_sums.detach(), torch.stack(counts).to(local_sums)]))
    global_sums, anchors = everyone.chunk(2)
    return pair_mean(local_sums, global_sums, anchors)


@torch.no_grad()
def agreeing(
    local: Views, everywhere: Views, pair: tuple[int, int], positives: int, step: int
) -> tuple[Tensor, Tensor]:
    """Returns the clips that agree most with each of this rank's, and which of them are any.

    Args:
        local, everywhere: as `infonce`.
        pair: the two views.
        positives: how many clips, k.
        step: side of a tile.

    Returns:
        ``(B, k)`` int64 rows of `everywhere`, ``(B, k)`` bool. None is true for a clip that lacks a view.
    """
    size = len(local.group)
    best = local.embeddings.new_full((size, positives), -torch.inf)
    chosen = torch.zeros(size, positives, dtype=torch.int64, device=best.device)
    for r, c in tiles(size, len(everywhere.group), step):
        counted = local.group[r, None] != everywhere.group[c]
        like = torch.full_like(counted, torch.inf, dtype=best.dtype)
        for view in pair:
            counted = counted & local.present[r, view, None] & everywhere.present[c, view]
            like = torch.minimum(like, local.embeddings[r, view] @ everywhere.embeddings[c, view].T)
        like = like.masked_fill(~counted, -torch.inf)
        places = torch.arange(c.start, c.stop, device=best.device).expand_as(like)
        best[r], kept = torch.cat([best[r], like], dim=1).topk(positives, dim=1)
        chosen[r] = torch.cat([chosen[r], places], dim=1).gather(1, kept)
    return chosen, best > -torch.inf


def _logsums(local: Views, everywhere: Views, view: int, scale: Tensor, step: int) -> Tensor:
    """Returns the log-sum over J_i of each of this rank's clips ``(B,)``; finite, and meaningless, over none."""
    total_clips = len(everywhere.group)
    # Split once: the gradient of each slice would be as large as the whole.
    rows, columns = local.embeddings[:, view].split(step), everywhere.embeddings[:, view].split(step)
    parts: dict[int, list[Tensor]] = {}
    for r, c in tiles(len(local.group), total_clips, step):
        counted = (local.group[r, None] != everywhere.group[c]) & everywhere.present[c, view]
        given = (rows[r.start // step], columns[c.start // step], scale, counted)
        tiled = step < total_clips  # then nothing of a tile is kept for the way back
        part = checkpoint(_logsum, *given, use_reentrant=False) if tiled else _logsum(*given)
        parts.setdefault(r.start, []).append(part)
    return torch.cat([torch.stack(row).logsumexp(0) for row in parts.values()])


def _likeness(local: Views, everywhere: Views, view: int, chosen: Tensor, found: Tensor) -> Tensor:
    """Returns the mean similarity of this rank's clips to their positives ``(B,)``; 0 for those without one."""
    rows, columns = local.embeddings[:, view], everywhere.embeddings[:, view]  # (B, E), (N, E)
    share = found.to(rows.dtype) / found.sum(1, keepdim=True).clamp(min=1)  # (B, k)
    # What was not found may point to a clip without this view, of any numbers.
    near = columns[chosen].masked_fill(~found.unsqueeze(2), 0)  # (B, k, E)
    return torch.einsum("be,bke,bk->b", rows, near, share)


def _logsum(rows: Tensor, columns: Tensor, scale: Tensor, counted: Tensor) -> Tensor:
    return (scale * (rows @ columns.T)).masked_fill(~counted, _NOTHING).logsumexp(1)
