"""Squeeze and excitation across modalities: what one shows decides which channels of another count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crossgate.config import ExchangeConfig
from crossgate.model.fusion.base import exact, small_start


class Exchange(nn.Module):
    """Recalibrates each modality's last feature maps, clip by clip, by what all present modalities show::

        S_m = mean of F_m over frames and places        (absent: 0)
        Z   = ReLU(W [S_1 ... S_M])                     of width 2 (C_1 + ... + C_M) / ratio
        F_m <- 2 sigmoid(W_m Z) F_m

    MMTM (Joze et al. 2020, arXiv 1911.08670) for M modalities, at one place: the last maps before pooling. The
    excitations start near 1, so that pretrained encoders start as they were. W sees zeros for an absent modality: the
    sum without that modality's columns.

    Args:
        config: the ratio.
        channels: C_m of each modality, in their order.
    """

    def __init__(self, config: ExchangeConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width = max(1, 2 * sum(channels) // config.ratio)
        self.squeeze = nn.Linear(sum(channels), width)
        self.excite = nn.ModuleList(nn.Linear(width, count) for count in channels)
        for layer in self.excite:
            assert isinstance(layer, nn.Linear)
            small_start(layer)

    def forward(self, maps: Sequence[Tensor], seen: Tensor) -> list[Tensor]:
        """Returns the maps, recalibrated.

        Args:
            maps: of each modality ``(B, T_m, P_m, C_m)``: frames, places, channels.
            seen: ``(B, M)`` bool, which modalities have a say.
        """
        squeezed = [
            one.to(exact(one.dtype)).mean(dim=(1, 2)).masked_fill(~seen[:, m : m + 1], 0) for m, one in enumerate(maps)
        ]  # (B, C_m) each
        joint = self.squeeze(torch.cat(squeezed, dim=1).to(self.squeeze.weight.dtype)).relu()  # (B, width)
        factors = [2 * layer(joint).to(exact(joint.dtype)).sigmoid() for layer in self.excite]  # (B, C_m) each
        return [one * factor[:, None, None].to(one.dtype) for one, factor in zip(maps, factors)]
