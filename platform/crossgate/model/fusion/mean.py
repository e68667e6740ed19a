"""Uniform mean: every present modality counts alike. The baseline that a gate has to beat."""

from __future__ import annotations

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import (
    Experts,
    Fusion,
    FusionInput,
    FusionOutput,
    mix,
    register,
    uniform_weights,
)


@register("mean", "average")
class MeanFusion(Fusion):
    """``f = (1/n) sum_m E_m(x_m)`` over the n present modalities, ``E_m`` linear."""

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.experts = Experts(modalities, dim)

    def forward(self, clip: FusionInput) -> FusionOutput:
        weights = uniform_weights(clip.present, clip.features.dtype)
        return FusionOutput(embedding=mix(self.experts(clip.features), weights), weights=weights)
