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
        self._split = False

    def forward(self, stream: Tensor) -> Tensor:
        return self.norm(self.temporal(self.frames(stream)))

    def frames(self, stream: Tensor) -> Tensor:
        """Returns a feature of each frame, ``(B, T, C, H, W) -> (B, T, D)``: what is pooled over time."""
        return self.project(self._pooled(self._seen(self._pictures(stream)))).unflatten(0, stream.shape[:2])

    def split(self, image: tuple[int, int, int]) -> int:
        """Makes the backbone stop before its pooling, so that `maps` and `from_maps` can be used; returns their C.

        The backbone is still called as a module, for ZeRO-3 gathers its weights there.

        Args:
            image: ``(C, H, W)`` of one frame.
        """
        self.backbone.forward = self.backbone.forward_features  # type: ignore[assignment, method-assign]
        self._split = True
        with torch.no_grad():
            self._channels = _channel_axis(self.backbone(self.project.weight.new_zeros(1, *image)), self.backbone)
        return int(self.backbone.num_features)  # type: ignore[arg-type]

    def maps(self, stream: Tensor) -> Tensor:
        """Returns the last feature maps ``(B, T, C, H, W) -> (B, T, ...)``, as the backbone lays them out."""
        return self._seen(self._pictures(stream)).unflatten(0, stream.shape[:2])

    def places(self, maps: Tensor) -> Tensor:
        """Returns `maps` as ``(B, T, P, C)``: frames, places, channels."""
        return maps.movedim(self._channels, -1).flatten(2, -2)

    def from_maps(self, maps: Tensor, places: Tensor) -> Tensor:
        """Returns the feature ``(B, D)`` of changed `places` ``(B, T, P, C)``, laid out as `maps`."""
        there = maps.movedim(self._channels, -1).shape
        changed = places.view(there).movedim(-1, self._channels).flatten(0, 1)
        return self.norm(self.temporal(self.project(self._pooled(changed)).unflatten(0, maps.shape[:2])))

    def _pictures(self, stream: Tensor) -> Tensor:
        pictures = stream.flatten(0, 1)  # (B * T, C, H, W)
        pictures = pictures.to(torch.promote_types(self.mean.dtype, torch.float32))
        pictures = (pictures - self.mean) / self.std
        return pictures.to(self.project.weight.dtype).contiguous(memory_format=torch.channels_last)

    def _pooled(self, seen: Tensor) -> Tensor:
        return self.backbone.forward_head(seen) if self._split else seen  # type: ignore[operator]

    def checkpoint_activations(self) -> None:
        """Keeps few activations of the backbone for the backward pass and computes the others again then.

        Block by block where timm can, else the backbone as a whole.
        """
        try:
            self.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError, NotImplementedError):
            self._recomputed = True

    def _seen(self, pictures: Tensor) -> Tensor:
        """The backbone's output, ``(N, C, H, W) -> (N, F)``; maps, where it is split."""
        if self._recomputed and torch.is_grad_enabled():
            return checkpoint(self.backbone, pictures, use_reentrant=False)
        return self.backbone(pictures)


def _channel_axis(maps: Tensor, backbone: nn.Module) -> int:
    """Returns the axis of channels counted from the end, of ``(N, C, h, w)``, ``(N, h, w, C)`` or ``(N, L, C)``."""
    return -3 if maps.ndim == 4 and maps.shape[1] == backbone.num_features else -1
