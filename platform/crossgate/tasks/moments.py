"""Pretext tasks of time: which frames of a clip are shown, in which order, and what is to be told of it.

Encoders see frames one by one, so frames are reordered as features, after the encoder, which costs nothing.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, nn

SEGMENT_ORDERS = tuple(permutations(range(3)))
PARTS = 4  # of time, that a head tells apart


def arrow(frames: int, way: Tensor) -> Tensor:
    """Returns ``(B, T)`` places: forwards where `way` ``(B,)`` is 0, backwards where it is 1 (Wei et al. 2018)."""
    forwards = torch.arange(frames, device=way.device)
    return torch.where(way.unsqueeze(1) == 0, forwards, forwards.flip(0))


def speed(frames: int, fast: Tensor, start: Tensor) -> Tensor:
    """Returns ``(B, T // 2)`` places: neighbours from a random start, or every second one where `fast` ``(B,)`` is 1.

    (Benaim et al. 2020, SpeedNet, arXiv 2004.06130.) Both show as many frames, so that their number tells nothing.

    Args:
        frames: T, 4 or more.
        fast: ``(B,)`` int64, 0 or 1.
        start: ``(B,)`` in 0..1, where the slow one begins.
    """
    shown = frames // 2
    first = within(start, frames - shown + 1) * (1 - fast)
    return first.unsqueeze(1) + torch.arange(shown, device=fast.device) * (1 + fast).unsqueeze(1)


def order(frames: int, label: Tensor) -> Tensor:
    """Returns ``(B, 3 * (T // 3))`` places: three equal parts in the order of `SEGMENT_ORDERS` (Xu et al. 2019)."""
    length = frames // 3
    chosen = torch.tensor(SEGMENT_ORDERS, device=label.device)[label]  # (B, 3)
    return (chosen.unsqueeze(2) * length + torch.arange(length, device=label.device)).flatten(1)


def rolled(steps: int, shift: Tensor) -> Tensor:
    """Returns ``(B, steps)`` places: everything later by `shift` ``(B,)`` steps, the end taking the start's place."""
    return (torch.arange(steps, device=shift.device) - shift.unsqueeze(1)) % steps


def apart(frames: int, share: Tensor) -> Tensor:
    """Returns ``(B,)`` a number of frames that sound and pictures are shifted by: a quarter of T to three quarters.

    (Owens & Efros 2018; Korbar et al. 2018.) Both are rolled, in step or not: the seam of a roll tells nothing.
    """
    least = max(1, frames // 4)
    return least + within(share, frames - 2 * least + 1)


def within(share: Tensor, count: int) -> Tensor:
    """Returns whole numbers 0 to count - 1, alike often for shares uniform in 0..1."""
    return (share * count).long().clamp(max=count - 1)  # the largest share may round up to count


def shown(features: Tensor, places: Tensor) -> Tensor:
    """Returns the features ``(B, T, D)`` of the frames at ``(B, T')`` places: the mean of at most `PARTS` parts
    of time, in a row, ``(B, parts * D)``."""
    seen = features.gather(1, places.unsqueeze(2).expand(-1, -1, features.shape[2]))  # (B, T', D)
    parts = min(PARTS, places.shape[1])
    return nn.functional.adaptive_avg_pool1d(seen.transpose(1, 2), parts).transpose(1, 2).flatten(1)
