"""Gates that look at how sure each modality is: by a formula (entropy), or by a learned perceptron (confidence)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import FusionInput, Scorer, masked_softmax, register
from crossgate.model.fusion.scores import ScoreFusion, surprise, unimodal


@register("entropy_logits", "gate")
class EntropyLogits(ScoreFusion):
    """``z = sum_m g_m z_m``, ``g = softmax(-H(p_m) / T)`` over what is present, H Shannon's entropy. No parameters.

    In the spirit of the Shannon fusion of Correlation Net (Yudistira & Kurita 2020, arXiv 1807.08291). The weights
    pass no gradient to the heads.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.temperature = config.temperature

    def weigh(self, clip: FusionInput) -> Tensor:
        _, entropy = surprise(unimodal(clip))
        return masked_softmax(-entropy / self.temperature, clip.present)


@register("entropy_probabilities", "gate")
class EntropyProbabilities(EntropyLogits):
    """``p = sum_m g_m softmax(z_m)``, ``g`` as for `entropy_logits`. No parameters."""

    mixes = "probabilities"


@register("confidence_logits", "gate")
class ConfidenceLogits(ScoreFusion):
    """``z = sum_m g_m z_m``, ``g = softmax(s / T)``, ``s`` a perceptron on all ``log p_m`` and ``H(p_m) / log K``.

    A stacked mixture of experts (Wolpert 1992; gate of Jacobs et al. 1991) that sees the scores and nothing else.
    The gate passes no gradient to the heads through what it reads.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        assert classes is not None
        self.temperature, self.nats = config.temperature, math.log(max(classes, 2))
        self.scorer = Scorer(modalities, classes + 1, config.hidden, modalities)

    def weigh(self, clip: FusionInput) -> Tensor:
        scores, entropy = surprise(unimodal(clip))
        facts = torch.cat([scores, entropy.unsqueeze(-1) / self.nats], dim=-1)  # (B, M, K + 1)
        facts = facts.masked_fill(~clip.present.unsqueeze(-1), 0).to(clip.features.dtype)
        return masked_softmax(self.scorer(facts) / self.temperature, clip.present)


@register("confidence_probabilities", "gate")
class ConfidenceProbabilities(ConfidenceLogits):
    """``p = sum_m g_m softmax(z_m)``, ``g`` as for `confidence_logits`."""

    mixes = "probabilities"
