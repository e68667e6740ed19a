"""Mixtures of unimodal experts under a softmax gate that looks at the features."""

from __future__ import annotations

from torch import Tensor

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import FusionInput, FusionOutput, Scorer, masked_softmax, register
from crossgate.model.fusion.scores import ScoreFusion, log_mixture, unimodal


@register("softmax_logits", "gate")
class SoftmaxLogits(ScoreFusion):
    """``z = sum_m g_m z_m``, ``g = softmax(s / T)``, ``s`` a perceptron on all features, ``-inf`` for absent m.

    Gating of stream scores as Zhu et al. 2017, arXiv 1709.03655 (there with a ReLU gate on convolutional features).
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.temperature = config.temperature
        self.scorer = Scorer(modalities, dim, config.hidden, modalities)

    def weigh(self, clip: FusionInput) -> Tensor:
        return masked_softmax(self.scorer(clip.features) / self.temperature, clip.present)


@register("softmax_probabilities", "gate")
class SoftmaxProbabilities(SoftmaxLogits):
    """``p = sum_m g_m softmax(z_m)``, ``g`` as for `softmax_logits`: the mixture of experts proper.

    Its cross entropy is the likelihood of Jacobs et al. 1991, equation 1.3, for classes; for rgb and flow, Yudistira &
    Kurita 2017 (doi 10.1186/s13640-017-0235-9).
    """

    mixes = "probabilities"


@register("classwise_logits", "gate")
class ClasswiseLogits(ScoreFusion):
    """``z_c = sum_m g_mc z_mc``, for each class c a softmax over what is present, from a perceptron on all features.

    The mixture-of-experts baseline of Arevalo et al. 2017 (arXiv 1702.01992); class-wise weights also in Mees et al.
    2016 (arXiv 1707.05733) and its sequel. Reported weights are the means over classes.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        assert classes is not None
        self.temperature = config.temperature
        self.scorer = Scorer(modalities, dim, config.hidden, modalities * classes)

    def forward(self, clip: FusionInput) -> FusionOutput:
        logits = unimodal(clip)  # (B, M, K)
        scores = self.scorer(clip.features).view_as(logits) / self.temperature
        weights = masked_softmax(scores.transpose(1, 2), clip.present.unsqueeze(1).expand(-1, logits.shape[2], -1))
        weights = weights.transpose(1, 2)  # (B, M, K)
        mixed = (weights.to(logits.dtype) * logits).sum(1) if self.mixes == "logits" else log_mixture(logits, weights)
        return FusionOutput(logits=mixed, weights=weights.mean(-1))


@register("classwise_probabilities", "gate")
class ClasswiseProbabilities(ClasswiseLogits):
    """``p_c`` in proportion to ``sum_m g_mc softmax(z_m)_c``, ``g`` as for `classwise_logits`.

    Weights of a class sum to 1 over modalities, not over classes, so that what is mixed is no distribution yet.
    """

    mixes = "probabilities"
