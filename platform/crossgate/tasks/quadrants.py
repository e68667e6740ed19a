"""Pretext tasks of pictures: one quadrant of every frame is mirrored, turned, and its colours are exchanged.

The transform of gated self-supervised learning (Fuadi et al. 2023, arXiv 2301.05865; the quadrant and its rotation are
LoRot's, Moon et al. 2022): first the flip, then the quarter turns, then the channels, alike in all frames of a clip.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, nn

CHANNEL_ORDERS = tuple(permutations(range(3)))


class Quadrants(nn.Module):
    """Changes one quadrant of each clip's frames, the clip's own way.

    Args:
        side: of the square pictures, in pixels; of an odd one the last row and column stay as they are.
    """

    sources: Tensor
    inside: Tensor
    orders: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        sources, inside = [], []
        for quadrant in range(4):
            rows, columns = _window(side, quadrant)
            mask = torch.zeros(side, side, dtype=torch.bool)
            mask[rows, columns] = True
            inside.append(mask)
            for flip in range(2):
                for turns in range(4):
                    picture = torch.arange(side * side).view(side, side)
                    piece = picture[rows, columns].flip(-1) if flip else picture[rows, columns].clone()
                    picture[rows, columns] = piece.rot90(turns)
                    sources.append(picture.flatten())
        self.register_buffer("sources", torch.stack(sources), persistent=False)  # (32, S * S): where a pixel is from
        self.register_buffer("inside", torch.stack(inside), persistent=False)  # (4, S, S)
        self.register_buffer("orders", torch.tensor(CHANNEL_ORDERS), persistent=False)  # (6, 3)

    def forward(
        self, stream: Tensor, quadrant: Tensor, flip: Tensor, turns: Tensor, order: Tensor, *, modality: str
    ) -> Tensor:
        """Returns the changed clips, ``(B, T, C, S, S)`` of the same type.

        Args:
            stream: ``(B, T, C, S, S)``.
            quadrant: ``(B,)`` int64, 0 to 3: top left, top right, bottom left, bottom right.
            flip: ``(B,)`` int64, 1 to mirror left and right.
            turns: ``(B,)`` int64, 0 to 3 quarter turns counter-clockwise.
            order: ``(B,)`` int64, 0 to 5 of `CHANNEL_ORDERS`; rgb only.
            modality: flow's vectors are mirrored and turned along.
        """
        code = (quadrant * 2 + flip) * 4 + turns
        moved = self.sources[code][:, None, None].expand(-1, *stream.shape[1:3], -1)  # (B, T, C, S * S)
        out = stream.flatten(-2).gather(-1, moved).view(stream.shape)
        if modality == "rgb":
            changed = out.gather(2, self.orders[order][:, None, :, None, None].expand_as(out))
        elif modality == "flow":
            changed = _turned_vectors(out, flip, turns)
        else:
            return out
        return torch.where(self.inside[quadrant][:, None, None], changed, out)


def _window(side: int, quadrant: int) -> tuple[slice, slice]:
    half = side // 2
    top, left = half * (quadrant // 2), half * (quadrant % 2)
    return slice(top, top + half), slice(left, left + half)


def _turned_vectors(flow: Tensor, flip: Tensor, turns: Tensor) -> Tensor:
    """Mirrors and turns ``(B, T, 2, S, S)`` vectors (u to the right, v down), each clip's its own way."""
    u, v = flow.unbind(2)
    u = u * (1 - 2 * flip).to(flow.dtype).view(-1, 1, 1, 1)
    ways = torch.stack([torch.stack(way, dim=2) for way in ((u, v), (v, -u), (-u, -v), (-v, u))], dim=1)
    return ways[torch.arange(len(flow), device=flow.device), turns]  # one quarter turn takes right to up
