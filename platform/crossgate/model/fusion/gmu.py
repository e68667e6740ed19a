"""Gated multimodal unit (Arevalo et al. 2017, arXiv 1702.01992) for M modalities."""

from __future__ import annotations

import torch
from torch import nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Fusion, FusionInput, FusionOutput, register, share


@register("gmu", "gate")
class GMU(Fusion):
    """``z_m = sigmoid(W_m [x_1 .. x_M])``, ``h = sum_m z_m * tanh(V_m x_m)``, elementwise, ``z_m = 0`` for absent m.

    The M-modal form has independent gates (no sum to one), one a channel. Reported weights are the means of
    ``z_m`` over channels, as shares.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.gate = nn.Linear(modalities * dim, modalities * dim)
        self.value = nn.Parameter(torch.randn(modalities, dim, dim) * dim**-0.5)

    def forward(self, clip: FusionInput) -> FusionOutput:
        gates = torch.sigmoid(self.gate(clip.features.flatten(1)))  # (B, M * D)
        gates = gates.view_as(clip.features) * clip.present.unsqueeze(-1)  # (B, M, D)
        values = torch.tanh(torch.einsum("bmd,mde->bme", clip.features, self.value))
        weights = share(gates.to(torch.promote_types(gates.dtype, torch.float32)).mean(-1))
        return FusionOutput(embedding=(gates * values).sum(1), weights=weights)
