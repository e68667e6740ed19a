"""Attention bottlenecks: modalities talk through a few shared tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Fusion, FusionInput, FusionOutput, mix, register, uniform_weights


class Block(nn.Module):
    """A pre-norm transformer layer, ``(B, N, D) -> (B, N, D)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = math.gcd(dim, 4)
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.inward, self.outward = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.perceptron = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        joint = self.inward(self.before(tokens)).view(batch, count, 3, self.heads, -1)
        query, key, value = joint.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.outward(attended.transpose(1, 2).reshape(batch, count, dim))
        return tokens + self.perceptron(self.between(tokens))


class Layer(nn.Module):
    """One block a modality; each sees its own token and the shared ones."""

    def __init__(self, modalities: int, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(modalities))

    def forward(self, features: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``(B, M, D)`` and ``(B, tokens, D)`` to ``(B, M, D)`` and each modality's ``(B, M, tokens, D)``."""
        tokens = [block(torch.cat([features[:, m : m + 1], shared], dim=1)) for m, block in enumerate(self.blocks)]
        seen = torch.stack(tokens, dim=1)  # (B, M, 1 + tokens, D)
        return seen[:, :, 0], seen[:, :, 1:]


@register("bottleneck", "fusion")
class BottleneckFusion(Fusion):
    """``[x_m; b_m] <- Layer_m([x_m; b])``, ``b <- mean_m b_m`` over what is present, L times; f is the mean ``x_m``.

    MBT (Nagrani et al. 2021, arXiv 2107.00135), equations 8 and 9, with one token a modality: its pooled feature. The
    tokens b are learned. It needs two layers or more: in the first, a modality meets no other yet.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.tokens = nn.Parameter(torch.randn(config.tokens, dim) * 0.02)
        self.layers = nn.ModuleList(Layer(modalities, dim) for _ in range(config.layers))

    def no_weight_decay(self) -> set[str]:
        return {"tokens"}

    def forward(self, clip: FusionInput) -> FusionOutput:
        weights = uniform_weights(clip.present, clip.features.dtype)
        features, shared = clip.features, self.tokens.expand(len(clip.features), -1, -1)  # (B, M, D), (B, tokens, D)
        for layer in self.layers:
            features, met = layer(features, shared)
            shared = mix(met.flatten(2), weights).view_as(shared)
        return FusionOutput(embedding=mix(features, weights))
