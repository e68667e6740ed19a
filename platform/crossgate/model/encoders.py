"""The encoder: one timm backbone for one modality, from a stream of frames to one feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossgate.config import EncoderConfig
from crossgate.modality import MODALITIES
from crossgate.model.backbones import build_backbone
from crossgate.model.temporal import build_temporal


class Encoder(nn.Module):
    """Maps ``(B, T, C, H, W)`` in the modality's unit, of any dtype, to ``(B, D)``.

    Standardises, folds the frames into the batch, runs the backbone, projects to D, pools over time, normalises.
    Clips do not influence one another: there are no batch statistics anywhere.

    Args:
        modality: a name in `modality.MODALITIES`.
        config: backbone and temporal pooling.
        shape: ``(T, C, H, W)`` of one clip.
        dim: D.

    Raises:
        UserError: see `backbones.build_backbone`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, modality: str, config: EncoderConfig, shape: tuple[int, int, int, int], dim: int) -> None:
        super().__init__()
        entry = MODALITIES[modality]
        frames, channels, height, width = shape
        self.register_buffer("mean", torch.tensor(entry.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(entry.std).view(-1, 1, 1))
        self.backbone, features = build_backbone(modality, config, (channels, height, width))
        self.project = nn.Linear(features, dim)
        self.temporal = build_temporal(config.temporal, dim, frames)
        self.norm = nn.LayerNorm(dim)
        self._recomputed = False

    def forward(self, stream: Tensor) -> Tensor:
        return self.norm(self.temporal(self.frames(stream)))

    def frames(self, stream: Tensor) -> Tensor:
        """Returns a feature of each frame, ``(B, T, C, H, W) -> (B, T, D)``: what is pooled over time."""
        batch, frames = stream.shape[:2]
        pictures = stream.flatten(0, 1)  # (B * T, C, H, W)
        pictures = pictures.to(torch.promote_types(self.mean.dtype, torch.float32))
        pictures = (pictures - self.mean) / self.std
        pictures = pictures.to(self.project.weight.dtype).contiguous(memory_format=torch.channels_last)
        return self.project(self._seen(pictures)).unflatten(0, (batch, frames))

    def checkpoint_activations(self) -> None:
        """Keeps few activations of the backbone for the backward pass and computes the others again then.

        Block by block where timm can, else the backbone as a whole.
        """
        try:
            self.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError, NotImplementedError):
            self._recomputed = True

    def _seen(self, pictures: Tensor) -> Tensor:
        """The backbone's output, ``(N, C, H, W) -> (N, F)``."""
        if self._recomputed and torch.is_grad_enabled():
            return checkpoint(self.backbone, pictures, use_reentrant=False)
        return self.backbone(pictures)
