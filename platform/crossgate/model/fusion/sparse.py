"""A sparse gate: each clip uses only its k best modalities."""

from __future__ import annotations

import torch
from torch import Tensor

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
    uniform_weights,
)

LEVELS = 4096


@register("sparse", "gate")
class SparseGate(Fusion):
    """``f = (1/k) sum E_m(x_m)`` over the k present modalities of the highest ``s_m + noise_m``, ``s`` a perceptron.

    Straight-through Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144), as AdaMML chooses modalities (Panda et al.
    2021, arXiv 2105.05165): forward the hard choice, backward the softmax at temperature T. Noise only while training.
    `routing` is the softmax without noise; the task balances it (see `objectives.gating`).
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.temperature, self.top = config.temperature, min(config.top, modalities)
        self.scorer = Scorer(modalities, dim, config.hidden, modalities)
        self.experts = Experts(modalities, dim)

    def forward(self, clip: FusionInput) -> FusionOutput:
        scores = self.scorer(clip.features)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        noisy = scores + gumbel(clip.draws).to(scores) if self.training and clip.draws is not None else scores
        soft = masked_softmax(noisy / self.temperature, clip.present)
        hard = uniform_weights(self.choice(noisy, clip.present), soft.dtype)
        weights = hard + (soft - soft.detach())
        return FusionOutput(
            embedding=mix(self.experts(clip.features), weights),
            weights=weights,
            routing=masked_softmax(scores / self.temperature, clip.present),
        )

    def choice(self, scores: Tensor, present: Tensor) -> Tensor:
        """Returns ``(B, M)`` bool: the best k of what is present, or all where there are fewer."""
        ranked = scores.masked_fill(~present, -torch.inf).topk(self.top, dim=1).indices
        return torch.zeros_like(present).scatter(1, ranked, True) & present


def gumbel(draws: Tensor) -> Tensor:
    """Returns standard Gumbel noise of uniform numbers, from their low bits: the high ones decide modality dropout."""
    uniform = (draws.double() * LEVELS) % 1
    return -(-(uniform + 0.5 / LEVELS).clamp(max=1 - 0.5 / LEVELS).log()).log()
