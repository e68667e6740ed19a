"""Pooling by attention: a learned query asks, each modality answers."""

from __future__ import annotations

import math

import torch
from torch import nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Experts, Fusion, FusionInput, FusionOutput, masked_softmax, register


@register("attention", "gate")
class AttentionPooling(Fusion):
    """``f = U [sum_m a_m^h V_m^h x_m]_h``, ``a^h = softmax_m(q^h . (K^h norm(x_m) + e_m^h) / sqrt(d))``, q learned.

    Pooling by multihead attention with one seed (Lee et al. 2019, arXiv 1810.00825, section 3.2). ``e_m`` tells the
    modalities apart, ``V_m`` is linear, absent modalities get no attention. Reported weights are the heads' mean.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.heads = math.gcd(dim, 4)
        self.query = nn.Parameter(torch.randn(self.heads, dim // self.heads))
        self.norm, self.key = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.place = nn.Parameter(torch.zeros(modalities, dim))
        self.experts, self.join = Experts(modalities, dim), nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"query", "place"}

    def forward(self, clip: FusionInput) -> FusionOutput:
        batch, count, _ = clip.features.shape
        keys = (self.key(self.norm(clip.features)) + self.place).view(batch, count, self.heads, -1)  # (B, M, H, d)
        scores = torch.einsum("bmhd,hd->bhm", keys, self.query) / math.sqrt(keys.shape[-1])
        attention = masked_softmax(scores, clip.present.unsqueeze(1).expand_as(scores))  # (B, H, M)
        values = self.experts(clip.features).view(batch, count, self.heads, -1)
        pooled = torch.einsum("bhm,bmhd->bhd", attention.to(values.dtype), values).flatten(1)
        return FusionOutput(embedding=self.join(pooled), weights=attention.mean(1))
