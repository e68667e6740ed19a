"""Softmax gate: a mixture of experts over modalities (Jacobs et al. 1991; for two streams, Yudistira & Kurita 2017)."""

from __future__ import annotations

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import (
    Experts,
    Fusion,
    FusionInput,
    FusionOutput,
    Scorer,
    masked_softmax,
    mix,
    register,
)


@register("softmax", "gate")
class SoftmaxGate(Fusion):
    """``g = softmax(s / T)`` with ``s_m = -inf`` for absent m; ``f = sum_m g_m E_m(x_m)``, ``E_m`` linear.

    ``s`` is a two-layer perceptron on all features; the weights of the modalities compete.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.temperature = config.temperature
        self.scorer = Scorer(modalities, dim, config.hidden, modalities)
        self.experts = Experts(modalities, dim)

    def forward(self, clip: FusionInput) -> FusionOutput:
        weights = masked_softmax(self.scorer(clip.features) / self.temperature, clip.present)
        return FusionOutput(embedding=mix(self.experts(clip.features), weights), weights=weights)
