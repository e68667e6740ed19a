"""Averages of class scores, equal or by fixed weights: the baselines that every gate has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from crossgate.config import FusionConfig
from crossgate.errors import UserError
from crossgate.model.fusion.base import FusionInput, register, share, uniform_weights
from crossgate.model.fusion.scores import ScoreFusion


@register("average_logits", "average")
class AverageLogits(ScoreFusion):
    """``z = (1/n) sum_m z_m`` over the n present modalities. No parameters."""

    def weigh(self, clip: FusionInput) -> Tensor:
        return uniform_weights(clip.present, clip.features.dtype)


@register("average_probabilities", "average")
class AverageProbabilities(AverageLogits):
    """``p = (1/n) sum_m softmax(z_m)`` over the n present modalities: two-stream averaging. No parameters.

    Simonyan & Zisserman 2014, arXiv 1406.2199, section 3, for two streams.
    """

    mixes = "probabilities"


@register("fixed_logits", "fusion")
class FixedLogits(ScoreFusion):
    """``z = sum_m w_m z_m``, ``w`` from `model.fusion.weights`, renormalised over what is present. No parameters.

    Wang et al. 2016 (TSN, arXiv 1608.00859) weigh rgb and flow 1 : 1.5. Tune on validation groups:
    `search.space` takes lists of weights. Where only modalities of weight 0 are present, they count alike.
    """

    weights: Tensor

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        weights = torch.tensor(config.weights or (1.0,) * modalities)
        if len(weights) != modalities or weights.sum() == 0:
            raise UserError(
                f"{list(config.weights)} cannot weigh {modalities} modalities",
                where="model.fusion.weights",
                expected="one number a modality, in the order of data.clip.modalities, not all zero",
            )
        self.register_buffer("weights", weights, persistent=False)

    def weigh(self, clip: FusionInput) -> Tensor:
        uniform = uniform_weights(clip.present, clip.features.dtype)
        kept = self.weights.to(uniform) * clip.present  # (B, M)
        return torch.where(kept.sum(-1, keepdim=True) > 0, share(kept), uniform)


@register("fixed_probabilities", "fusion")
class FixedProbabilities(FixedLogits):
    """``p = sum_m w_m softmax(z_m)``, ``w`` from `model.fusion.weights` as for `fixed_logits`. No parameters."""

    mixes = "probabilities"
