"""The flow gate: motion decides which channels of rgb count."""

from __future__ import annotations

import torch
from torch import nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Experts, Fusion, FusionInput, FusionOutput, mix, register, uniform_weights

RGB, FLOW = 0, 1  # places in the order of all modalities


@register("flow_gate", "gate")
class FlowGate(Fusion):
    """``y_rgb = E_rgb(x_rgb) * sigmoid(G x_flow)``; f is its mean with ``E_m(x_m)`` of the further modalities.

    Flow Gated Network (Cheng et al. 2019, arXiv 1911.05913), on pooled features instead of feature maps. Without flow
    the gate is sigmoid(0); without rgb, ``E_flow(x_flow)`` stands in for the product.
    """

    needs_modalities = ("rgb", "flow")

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.experts, self.gate = Experts(modalities, dim), nn.Linear(dim, dim)

    def forward(self, clip: FusionInput) -> FusionOutput:
        values = self.experts(clip.features)  # (B, M, D)
        rgb, flow = clip.present[:, RGB], clip.present[:, FLOW]
        gate = torch.sigmoid(self.gate(clip.features[:, FLOW]))
        gate = torch.where(flow.unsqueeze(1), gate, torch.full_like(gate, 0.5))
        values = torch.cat([(values[:, RGB] * gate).unsqueeze(1), values[:, FLOW:]], dim=1)
        counted = torch.cat([clip.present[:, :FLOW], (flow & ~rgb).unsqueeze(1), clip.present[:, FLOW + 1 :]], dim=1)
        return FusionOutput(embedding=mix(values, uniform_weights(counted, values.dtype)))
