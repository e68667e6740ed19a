"""Random numbers that belong to a clip and a step, not to a process.

Modality dropout must hide the same modalities of the same clips on any number of ranks and after a restart, so its
draws are a hash of (seed, step, clip, modality) and not the next numbers of some generator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip_draws(seed: int, step: Tensor, clip: Tensor, count: int) -> Tensor:
    """Returns ``(B, count)`` float32, uniform in 0..1.

    Args:
        seed: of the run.
        step: 0-d int64, the optimiser step.
        clip: ``(B,)`` int64 ordinals of the clips.
        count: numbers a clip.
    """
    column = torch.arange(count, device=clip.device)
    state = _scramble(clip.unsqueeze(1) * count + column)  # (B, count)
    state = _scramble(state ^ _scramble(step + ((seed & 0x7FFFFFFF) << 32)))
    return (state & 0xFFFFFF).to(torch.float32) / (1 << 24)


def _scramble(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) in wrapping int64 arithmetic."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift keeps the sign, the hash wants zeros


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
