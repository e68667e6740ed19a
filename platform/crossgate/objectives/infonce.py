"""Masked symmetric InfoNCE between views of the same clips, over the global batch.

A view is one unit vector a clip: a modality's embedding or a fused one. For a pair of views (a, b) the positives are
the clips that have both. For a clip i of them (van den Oord et al. 2018; symmetric as CLIP, Radford et al. 2021)::

    l_ab(i) = -s <a_i, b_i> + log sum_{j in J_i} exp(s <a_i, b_j>)
    J_i     = {i} and every clip j that has view b and comes from another group than i

A clip of the same group is neither a positive nor a negative. The pair's loss is the mean over its positives in the
*global* batch of ``(l_ab + l_ba) / 2``; the loss is the mean over the pairs that have a positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossgate.objectives.gather import gather, pair_mean, rank, ranks, sum_over_ranks
from crossgate.objectives.tiles import Facts, tiled_logsumexp


@dataclass
class Views:
    """V views of this rank's B clips.

    Attributes:
        embeddings: ``(B, V, E)``, unit length; absent views hold any finite numbers.
        present: ``(B, V)`` bool.
        group: ``(B,)`` int64; clips with the same number are not contrasted.
    """

    embeddings: Tensor
    present: Tensor
    group: Tensor

    def gathered(self) -> Views:
        """Returns the views of the global batch, in rank order; gradients reach the rank they came from."""
        if ranks() == 1:
            return self
        facts = gather(torch.cat([self.group.unsqueeze(1), self.present.long()], dim=1))
        return Views(gather(self.embeddings), facts[:, 1:].bool(), facts[:, 0])


@dataclass
class Contrast:
    """The outcome of `infonce`, over the global batch.

    Attributes:
        loss: 0-d; its gradient, averaged over ranks, is the global loss's.
        pair_losses: ``(P,)`` detached, NaN for a pair without a positive.
        top1: 0-d detached, share of anchors that are nearest to their own positive; NaN without any.
    """

    loss: Tensor
    pair_losses: Tensor
    top1: Tensor


def infonce(local: Views, everywhere: Views, pairs: list[tuple[int, int]], scale: Tensor, *, tile: int = 0) -> Contrast:
    """Contrasts pairs of views.

    Args:
        local: this rank's clips.
        everywhere: `local.gathered()` (given, so that several contrasts share one gathering).
        pairs: indices of views, each unordered pair once.
        scale: 0-d, inverse temperature.
        tile: a global batch of more clips is contrasted in tiles of that side, to the same result; 0: never.
    """
    tiled = 0 < tile < len(everywhere.group)
    local_sums, hits = [], []
    for a, b in pairs:
        valid = local.present[:, a] & local.present[:, b]  # (B,)
        if tiled:
            there, back, hit_there, hit_back = tiled_losses(local, everywhere, a, b, scale, tile)
        else:
            there, hit_there = anchor_losses(local, everywhere, a, b, scale)
            back, hit_back = anchor_losses(local, everywhere, b, a, scale)
        local_sums.append(((there + back) / 2).masked_fill(~valid, 0).sum())
        hits.append(((hit_there & valid).sum() + (hit_back & valid).sum()) / 2)
    sums = torch.stack(local_sums)  # (P,)

    both = [everywhere.present[:, a] & everywhere.present[:, b] for a, b in pairs]
    counts = torch.stack(both).sum(1)  # (P,), global
    everyone = sum_over_ranks(torch.cat([sums.detach(), torch.stack(hits).to(sums.dtype)]))
    global_sums, global_hits = everyone.chunk(2)
    return Contrast(
        loss=pair_mean(sums, global_sums, counts),
        pair_losses=global_sums / counts,  # 0 / 0 is NaN: nothing was measured
        top1=global_hits.sum() / counts.sum(),
    )


def anchor_losses(local: Views, everywhere: Views, a: int, b: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``l_ab`` of this rank's clips ``(B,)``, and whether each is nearest to its own positive ``(B,)``.

    Finite, and meaningless, for clips that lack one of the two views. Products and exponentials are taken in fp32
    or better, whatever the autocast.
    """
    anchors, candidates = local.embeddings[:, a], everywhere.embeddings[:, b]  # (B, E), (N, E)
    rows = torch.arange(anchors.shape[0], device=anchors.device)
    own = rows + rank() * anchors.shape[0]  # where each anchor's positive stands among the candidates
    allowed = everywhere.present[:, b] & (local.group.unsqueeze(1) != everywhere.group)  # (B, N)
    allowed = allowed.index_put((rows, own), torch.ones_like(rows, dtype=torch.bool))
    with torch.autocast(anchors.device.type, enabled=False):
        exact = torch.promote_types(anchors.dtype, torch.float32)
        logits = scale.to(exact) * (anchors.to(exact) @ candidates.to(exact).T)  # (B, N)
        logits = logits.masked_fill(~allowed, -torch.inf)  # never a whole row: the own column stays
        losses = logits.logsumexp(dim=1) - logits[rows, own]
    return losses, logits.argmax(dim=1) == own


def tiled_losses(
    local: Views, everywhere: Views, a: int, b: int, scale: Tensor, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what `anchor_losses` gives for (a, b) and for (b, a), of one sweep over tiles."""
    size = len(local.group)
    offset = rank() * size
    with torch.autocast(local.embeddings.device.type, enabled=False):
        exact = torch.promote_types(local.embeddings.dtype, torch.float32)
        rows = local.embeddings[:, a].to(exact)  # (B, E)
        facts = Facts(
            row_group=local.group,
            row_present=local.present[:, a],
            column_group=everywhere.group,
            column_present=everywhere.present[:, b],
            offset=offset,
            tile=tile,
        )
        columns = everywhere.embeddings[:, b].to(exact)  # (N, E)
        there, back, hit_there, hit_back = tiled_logsumexp(rows, columns, scale.to(exact), facts)
        positive = scale.to(exact) * (rows * columns[offset : offset + size]).sum(-1)
    return there - positive, back - positive, hit_there, hit_back
