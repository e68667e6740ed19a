"""Low-rank multimodal fusion: products over modalities at the cost of sums."""

from __future__ import annotations

import torch
from torch import nn

from crossgate.config import FusionConfig
from crossgate.model.fusion.base import Fusion, FusionInput, FusionOutput, register


@register("lowrank", "fusion")
class LowRankFusion(Fusion):
    """``f = b + sum_r w_r prod_m W_m^(r) [1; x_m]``, the product over what is present.

    Liu et al. 2018 (arXiv 1806.00064): the tensor fusion of all modalities, its weight tensor of
    rank R. An absent modality is the factor 1.
    """

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__(config, modalities, dim, classes)
        self.factors = nn.Parameter(torch.randn(modalities, config.rank, dim, dim) * 0.5 * dim**-0.5)
        self.ones = nn.Parameter(torch.ones(modalities, config.rank, dim))  # the row that meets the 1 in [1; x]
        self.mixture = nn.Parameter(torch.full((config.rank,), config.rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim))

    def no_weight_decay(self) -> set[str]:
        return {"ones"}

    def forward(self, clip: FusionInput) -> FusionOutput:
        factors = torch.einsum("bmd,mrde->bmre", clip.features, self.factors) + self.ones  # (B, M, R, D)
        factors = factors.masked_fill(~clip.present[:, :, None, None], 1)
        product = factors.prod(dim=1)  # (B, R, D)
        return FusionOutput(embedding=torch.einsum("r,brd->bd", self.mixture, product) + self.bias)
