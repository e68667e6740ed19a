"""Heads: the projection onto the contrast's sphere, and the classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Two layers and L2 normalisation, ``(..., D) -> (..., E)`` in fp32 or better (as SimCLR's)."""

    def __init__(self, dim: int, embedding: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, embedding))

    def forward(self, features: Tensor) -> Tensor:
        projected = self.layers(features)
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return nn.functional.normalize(projected, dim=-1)


class ClassHead(nn.Module):
    """Layer norm and one linear layer, ``(..., D) -> (..., K)``."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))
