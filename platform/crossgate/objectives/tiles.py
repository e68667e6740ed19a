"""The sums of a contrast over the global batch, tile by tile: memory grows with the tile, not with the batch squared.

For two views a (this rank's B clips) and b (all N) the similarities ``S = s a b^T`` are made tile by tile, once forward
and once more backward, and never kept. One sweep serves both directions: rows give the log-sums of a against b, columns
those of b against a, of which each rank holds a part; the parts are added over ranks as ``(N,)`` vectors. Nothing is
approximated: a log-sum is the exact sum of its tiles' (Milakov & Gimelshein 2018, arXiv 1805.02867, eq. 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from crossgate.objectives.gather import ranks


@dataclass
class Facts:
    """Which similarities count.

    Attributes:
        row_group, row_present: ``(B,)`` group and presence of this rank's clips in view a.
        column_group, column_present: ``(N,)`` of all clips in view b.
        offset: column of this rank's first clip.
        tile: rows and columns of a tile.
    """

    row_group: Tensor
    row_present: Tensor
    column_group: Tensor
    column_present: Tensor
    offset: int
    tile: int


def tiled_logsumexp(
    rows: Tensor, columns: Tensor, scale: Tensor, facts: Facts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the log-sums of both directions for this rank's clips, and whether each finds its own positive.

    Sums run over the own clip and the present clips of other groups.

    Args:
        rows: ``(B, E)`` view a of this rank's clips, fp32 or fp64.
        columns: ``(N, E)`` view b of all clips.
        scale: 0-d.
        facts: what counts.

    Returns:
        ``(B,)`` log-sums of a against b; ``(B,)`` of b against a; two ``(B,)`` bool, the own clip is the nearest.
        Zeros, without gradient, for clips that lack one of the two views.
    """
    return _TiledLogSumExp.apply(rows, columns, scale, facts)


def tiles(rows: int, columns: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Yields the rows and columns of each tile, of `step` by `step` or what is left of that."""
    for i in range(0, rows, step):
        for j in range(0, columns, step):
            yield slice(i, min(i + step, rows)), slice(j, min(j + step, columns))


class _TiledLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor, scale: Tensor, facts: Facts):
        row, column = _Running(len(rows), rows), _Running(len(columns), rows)
        for r, c, similarity in _similarities(rows, columns, scale, facts):
            row.add(r, similarity, 1, c.start)
            column.add(c, similarity, 0, facts.offset + r.start)
        column.over_ranks()
        own = torch.arange(len(rows), device=rows.device) + facts.offset
        both = facts.row_present & facts.column_present[own]
        ctx.facts = facts
        ctx.save_for_backward(rows, columns, scale, row.logsum(), column.logsum())
        hits = row.best == own, column.best[own] == own
        ctx.mark_non_differentiable(*hits)
        return row.logsum().masked_fill(~both, 0), column.logsum()[own].masked_fill(~both, 0), *hits

    @staticmethod
    def backward(ctx, row_slope: Tensor, column_slope: Tensor, *_: Tensor):
        rows, columns, scale, row_sum, column_sum = ctx.saved_tensors
        facts: Facts = ctx.facts
        both = facts.row_present & facts.column_present[facts.offset : facts.offset + len(rows)]
        row_slope = row_slope.masked_fill(~both, 0)
        column_slope = _concatenated(column_slope.masked_fill(~both, 0))  # (N,), for all ranks' columns cross our rows
        row_gradient, column_gradient = torch.zeros_like(rows), torch.zeros_like(columns)
        for r, c, similarity in _similarities(rows, columns, scale, facts):
            slope = (similarity - row_sum[r, None]).exp_().mul_(row_slope[r, None])
            slope.add_(similarity.sub_(column_sum[c]).exp_().mul_(column_slope[c]))
            row_gradient[r].addmm_(slope, columns[c])
            column_gradient[c].addmm_(slope.T, rows[r])
        scale_gradient = (row_gradient * rows).sum()
        return row_gradient * scale, column_gradient * scale, scale_gradient.to(scale), None


class _Running:
    """Log-sums that grow tile by tile, with the nearest candidate so far."""

    def __init__(self, count: int, like: Tensor) -> None:
        self.largest = like.new_full((count,), -torch.inf)
        self.total = like.new_zeros(count)  # of exp(similarity - largest)
        self.best = torch.full((count,), -1, device=like.device)

    def add(self, part: slice, similarity: Tensor, axis: int, start: int) -> None:
        """Adds a tile's candidates along its `axis`; the first of them is the candidate `start`."""
        value, index = similarity.max(dim=axis)
        before, largest = self.largest[part], torch.maximum(self.largest[part], value)
        shift = largest.masked_fill(largest == -torch.inf, 0)  # nothing yet: exp(-inf) is 0, -inf - -inf is not
        added = (similarity - shift.unsqueeze(axis)).exp_().sum(dim=axis)
        self.best[part] = torch.where(value > before, index + start, self.best[part])
        self.total[part] = self.total[part] * (before - shift).exp() + added
        self.largest[part] = largest

    def over_ranks(self) -> None:
        """Adds up what the ranks have of the same sums."""
        if ranks() == 1:
            return
        parts = _concatenated(torch.stack([self.largest, self.total, self.best.to(self.total)]).unsqueeze(0))
        largest, total, best = parts.unbind(1)  # (ranks, N) each; numbers of clips are exact in fp32 below 2^24
        self.largest, first = largest.max(dim=0)
        shift = self.largest.masked_fill(self.largest == -torch.inf, 0)
        self.total = (total * (largest - shift).exp()).sum(0)
        self.best = best.gather(0, first.unsqueeze(0)).squeeze(0).long()

    def logsum(self) -> Tensor:
        """Returns the log-sums; plus infinity where nothing was added, so that its exponentials vanish."""
        return torch.where(self.total > 0, self.largest + self.total.log(), torch.inf)


def _similarities(rows: Tensor, columns: Tensor, scale: Tensor, facts: Facts) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields ``(rows, columns, S)`` of each tile, minus infinity where a similarity does not count."""
    for r, c in tiles(len(rows), len(columns), facts.tile):
        similarity = (rows[r] * scale) @ columns[c].T
        ignored = facts.row_group[r, None] == facts.column_group[c]
        ignored.diagonal(offset=facts.offset + r.start - c.start).fill_(False)  # the own clip counts
        ignored |= ~facts.row_present[r, None]
        ignored |= ~facts.column_present[c]
        yield r, c, similarity.masked_fill_(ignored, -torch.inf)


def _concatenated(local: Tensor) -> Tensor:
    if ranks() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(ranks())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)
