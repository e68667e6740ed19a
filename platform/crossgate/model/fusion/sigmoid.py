"""Sigmoid gate per modality: each decides for itself whether it counts, without competing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import (
    Experts,
    Fusion,
    FusionInput,
    FusionOutput,
    mix,
    register,
    share,
)


@register("sigmoid", "gate")
class SigmoidGate(Fusion):
    """``g_m = sigmoid(s_m / T)``, ``s_m = v_m . gelu(U_m x_m + C [x_1 .. x_M] + b_m) + c_m``, 0 for absent m.

    ``f = (2/n) sum_m g_m E_m(x_m)`` over the n present modalities, ``E_m`` linear: an open-minded gate
    (``g = 1/2``) is the uniform mean. Reported weights are ``g_m / sum_j g_j``. Independent gates after
    Arevalo et al. 2017 (GMU), one number a modality instead of one a channel.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.temperature = config.temperature
        self.own = nn.Parameter(torch.randn(modalities, dim, config.hidden) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(modalities, config.hidden))
        self.context = nn.Linear(modalities * dim, config.hidden, bias=False)
        self.score = nn.Parameter(torch.randn(modalities, config.hidden) * 0.01)
        self.offset = nn.Parameter(torch.zeros(modalities))
        self.experts = Experts(modalities, dim)

    def gates(self, clip: FusionInput) -> Tensor:
        """Returns ``(B, M)`` in 0..1, 0 for absent modalities."""
        own = torch.einsum("bmd,mdh->bmh", clip.features, self.own) + self.bias  # (B, M, hidden)
        context = self.context(clip.features.flatten(1)).unsqueeze(1)  # (B, 1, hidden)
        scores = (nn.functional.gelu(own + context) * self.score).sum(-1) + self.offset  # (B, M)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return torch.sigmoid(scores / self.temperature).masked_fill(~clip.present, 0.0)

    def forward(self, clip: FusionInput) -> FusionOutput:
        gates = self.gates(clip)
        count = clip.present.sum(-1, keepdim=True).clamp(min=1)
        embedding = mix(self.experts(clip.features), 2 * gates / count)
        return FusionOutput(embedding=embedding, weights=share(gates))
