"""Concatenation, with a learned token in the place of each absent modality."""

from __future__ import annotations

import torch
from torch import nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Fusion, FusionInput, FusionOutput, register


@register("concat", "fusion")
class ConcatFusion(Fusion):
    """``f = W [x_1 .. x_M] + b`` where an absent ``x_m`` is a learned token ``t_m``. Has no weights to report."""

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.missing = nn.Parameter(torch.randn(modalities, dim) * 0.02)
        self.join = nn.Linear(modalities * dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"missing"}

    def forward(self, clip: FusionInput) -> FusionOutput:
        tokens = torch.where(clip.present.unsqueeze(-1), clip.features, self.missing)  # (B, M, D)
        return FusionOutput(embedding=self.join(tokens.flatten(1)))
