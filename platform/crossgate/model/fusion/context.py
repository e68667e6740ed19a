"""Context gating: the fused feature gates its own channels."""

from __future__ import annotations

import torch
from torch import nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Experts, Fusion, FusionInput, FusionOutput, mix, register, uniform_weights


@register("context", "gate")
class ContextGating(Fusion):
    """``f = y * sigmoid(W y + b)``, ``y = (1/n) sum_m E_m(x_m)`` over the n present modalities.

    Miech et al. 2017 (arXiv 1706.06905), equation 1; after the join of several modalities as EPIC-Fusion (Kazakos et
    al. 2019, arXiv 1908.08498). The join is the sum of one linear map a modality (a layer on their concatenation),
    divided by their number. It weighs channels, so there are no weights of modalities to report.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.experts, self.gate = Experts(modalities, dim), nn.Linear(dim, dim)

    def forward(self, clip: FusionInput) -> FusionOutput:
        joined = mix(self.experts(clip.features), uniform_weights(clip.present, clip.features.dtype))  # (B, D)
        return FusionOutput(embedding=joined * torch.sigmoid(self.gate(joined)))
