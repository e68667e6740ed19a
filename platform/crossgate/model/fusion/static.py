"""Static weights: learned, and the same for all clips. What a gate gains beyond them it gains by looking."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Experts, Fusion, FusionInput, FusionOutput, masked_softmax, mix, register
from crossgate.model.fusion.scores import ScoreFusion


class StaticWeights(nn.Module):
    """``g = softmax(a)`` over what is present, ``a`` learned, one number a modality; uniform at the start."""

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(modalities))

    def forward(self, present: Tensor) -> Tensor:
        return masked_softmax(self.scores.expand(present.shape), present)


@register("static", "fusion")
class StaticFusion(Fusion):
    """``f = sum_m g_m E_m(x_m)``, ``g = softmax(a)`` over what is present, ``a`` learned, ``E_m`` linear."""

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.static, self.experts = StaticWeights(modalities), Experts(modalities, dim)

    def forward(self, clip: FusionInput) -> FusionOutput:
        weights = self.static(clip.present)
        return FusionOutput(embedding=mix(self.experts(clip.features), weights), weights=weights)


@register("static_logits", "fusion")
class StaticLogits(ScoreFusion):
    """``z = sum_m g_m z_m``, ``g = softmax(a)`` over what is present, ``a`` learned.

    The learnable late fusion of AdaMML (Panda et al. 2021, arXiv 2105.05165).
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.static = StaticWeights(modalities)

    def weigh(self, clip: FusionInput) -> Tensor:
        return self.static(clip.present)


@register("static_probabilities", "fusion")
class StaticProbabilities(StaticLogits):
    """``p = sum_m g_m softmax(z_m)``, ``g = softmax(a)`` over what is present, ``a`` learned."""

    mixes = "probabilities"
