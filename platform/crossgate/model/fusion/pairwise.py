"""Fusions in which modalities modulate one another: FiLM and Kiela's gate, for any number of modalities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Experts, Fusion, FusionInput, FusionOutput, mix, register, uniform_weights


def mean_of_others(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, for each modality, the mean over the other present ones ``(B, M, D)``, and whether there are any.

    Args:
        values: ``(B, M, D)``.
        present: ``(B, M)`` bool.

    Returns:
        The means, zeros where there is no other, and ``(B, M, 1)`` bool.
    """
    own = values * present.unsqueeze(-1)
    others = present.sum(1, keepdim=True) - present.long()  # (B, M)
    total = own.sum(1, keepdim=True) - own
    return total / others.clamp(min=1).unsqueeze(-1), (others > 0).unsqueeze(-1)


@register("film", "gate")
class FiLM(Fusion):
    """``f = U (1/n) sum_m (gamma_m * x_m + beta_m)``, ``gamma_m, beta_m`` linear in the mean of others' ``A_j x_j``.

    Feature-wise linear modulation (Perez et al. 2018, arXiv 1709.07871), ``gamma`` about 1, between every modality and
    what the clip has besides; a modality alone is not modulated (``gamma = 1, beta = 0``).
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.condition = Experts(modalities, dim)
        self.modulate = nn.Parameter(torch.randn(2, modalities, dim, dim) * 0.1 * dim**-0.5)
        self.offset = nn.Parameter(torch.zeros(2, modalities, dim))
        self.join = nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        return {"offset"}

    def forward(self, clip: FusionInput) -> FusionOutput:
        others, any_other = mean_of_others(self.condition(clip.features), clip.present)  # (B, M, D)
        changes = torch.einsum("bmd,cmde->cbme", others, self.modulate) + self.offset.unsqueeze(1)
        gamma, beta = changes.masked_fill(~any_other, 0).unbind()
        return FusionOutput(
            embedding=self.join(
                mix((1 + gamma) * clip.features + beta, uniform_weights(clip.present, clip.features.dtype))
            )
        )


@register("kiela", "gate")
class KielaGate(Fusion):
    """``f = U (1/n) sum_m (B_m x_m) * mean_(j != m) sigmoid(A_j x_j)`` over what is present.

    Kiela et al. 2018 (arXiv 1802.02892), the gated model, where one modality gates the other; here every one is gated
    by all the others. For a modality alone the gate is sigmoid(0).
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.gate, self.experts = Experts(modalities, dim), Experts(modalities, dim)
        self.join = nn.Linear(dim, dim)

    def forward(self, clip: FusionInput) -> FusionOutput:
        gates, any_other = mean_of_others(torch.sigmoid(self.gate(clip.features)), clip.present)
        gated = self.experts(clip.features) * gates.masked_fill(~any_other, 0.5)  # (B, M, D)
        return FusionOutput(embedding=self.join(mix(gated, uniform_weights(clip.present, clip.features.dtype))))
