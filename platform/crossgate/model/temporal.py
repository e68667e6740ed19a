"""How the features of T frames become one: mean, attention with a learned query, or a GRU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanPooling(nn.Module):
    """The mean over frames, ``(B, T, D) -> (B, D)``. Has no parameters and knows no order."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.mean(dim=1)


class AttentionPooling(nn.Module):
    """A learned query attends to the frames, each marked with its place in time, ``(B, T, D) -> (B, D)``.

    The pooled value is added to the mean over frames, so that training starts from mean pooling.

    Args:
        dim: D.
        frames: T.
        heads: attention heads, lowered to a divisor of D.
    """

    def __init__(self, dim: int, frames: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = next(h for h in range(heads, 0, -1) if dim % h == 0)
        self.place = nn.Parameter(torch.randn(frames, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def no_weight_decay(self) -> set[str]:
        return {"place"}

    def forward(self, frames: Tensor) -> Tensor:
        batch, steps, dim = frames.shape
        tokens = self.norm(frames + self.place)  # (B, T, D)
        key = self.key(tokens).view(batch, steps, self.heads, -1)  # (B, T, heads, D / heads)
        value = self.value(tokens).view(batch, steps, self.heads, -1)
        query = self.query.view(self.heads, -1)
        scores = (key * query).sum(-1) * key.shape[-1] ** -0.5  # (B, T, heads)
        weights = scores.softmax(dim=1)
        pooled = (weights.unsqueeze(-1) * value).sum(1).reshape(batch, dim)  # (B, D)
        return frames.mean(dim=1) + self.out(pooled)


class GRUPooling(nn.Module):
    """The last state of a GRU over the frames, ``(B, T, D) -> (B, D)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, frames: Tensor) -> Tensor:
        return self.gru(frames)[0][:, -1]


def build_temporal(kind: str, dim: int, frames: int) -> nn.Module:
    """Returns the pooling named by `EncoderConfig.temporal`; one frame needs none, whatever the name."""
    if kind == "mean" or frames == 1:
        return MeanPooling()
    if kind == "attention":
        return AttentionPooling(dim, frames)
    if kind == "gru":
        return GRUPooling(dim)
    raise KeyError(kind)
