"""timm backbones: by name, with the right number of channels, without batch statistics."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crossgate.config import EncoderConfig
from crossgate.errors import UserError, nearest

_WITHOUT_BATCH_NORM = "convnext_atto, convnext_tiny, vit_tiny_patch16_224, vit_small_patch16_224"


def build_backbone(modality: str, config: EncoderConfig, image: tuple[int, int, int]) -> tuple[nn.Module, int]:
    """Returns a timm model that maps ``(N, C, H, W)`` to ``(N, F)``, and ``F``.

    Args:
        modality: name, for messages.
        config: backbone, weights, norm and stochastic depth.
        image: ``(C, H, W)`` of one frame; models with a fixed input size (ViTs) are built for it.

    Raises:
        UserError: for an unknown name, batch norm under ``norm: keep``, or a model that refuses these channels or
            this size. The message names the key.
    """
    where = f"model.encoders.{modality}"
    backbone = _created(where, config, image)
    if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        if config.norm == "keep":
            raise UserError(
                f"backbone '{config.backbone}' has batch normalisation, whose statistics mix absent clips in and "
                "depend on the number of ranks",
                where=f"{where}.norm",
                expected=f"'group', or a backbone without it ({_WITHOUT_BATCH_NORM})",
                cure=f"set {where}.norm=group",
            )
        _to_group_norm(backbone)
    return backbone, _width(where, config, backbone, image)


def _created(where: str, config: EncoderConfig, image: tuple[int, int, int]) -> nn.Module:
    name = config.backbone
    if not timm.is_model(name):
        raise UserError(
            f"unknown backbone '{name}'",
            where=f"{where}.backbone",
            expected="a timm model",
            cure=nearest(name, timm.list_models()) if _resembles_a_model(name) else f"try {_WITHOUT_BATCH_NORM}",
        )
    cfg = timm.get_pretrained_cfg(name)
    extra: dict = {"img_size": image[1:]} if cfg is not None and cfg.fixed_input_size else {}
    if config.drop_path:
        extra["drop_path_rate"] = config.drop_path
    try:
        return timm.create_model(name, pretrained=config.pretrained, in_chans=image[0], num_classes=0, **extra)
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
        NotImplementedError,
        AttributeError,
    ) as error:
        raise _refusal(where, name, image, error) from None
    except OSError as error:  # weights that cannot be fetched
        raise UserError(
            f"no pretrained weights for '{name}' ({error})",
            where=f"{where}.pretrained",
            cure="set it to false",
        ) from None


def _resembles_a_model(name: str) -> bool:
    return "did you mean" in nearest(name, timm.list_models())


def _width(where: str, config: EncoderConfig, backbone: nn.Module, image: tuple[int, int, int]) -> int:
    """Returns F by running one blank frame, so that a size that the backbone cannot take is found at once."""
    mode = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            feature: Tensor = backbone(torch.zeros(1, *image))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise _refusal(where, config.backbone, image, error) from None
    backbone.train(mode)
    if feature.ndim != 2:
        raise _refusal(where, config.backbone, image, f"its output has the shape {tuple(feature.shape)}")
    return feature.shape[1]


def _refusal(where: str, name: str, image: tuple[int, int, int], reason: object) -> UserError:
    channels, height, width = image
    return UserError(
        f"backbone '{name}' does not take {channels} channels of {height} x {width} ({reason})",
        where=f"{where}.backbone",
        expected=f"a timm model that accepts in_chans and this size, such as {_WITHOUT_BATCH_NORM}",
    )


def _to_group_norm(parent: nn.Module) -> None:
    """Replaces every batch norm below the module by a group norm with the same affine parameters.

    timm's fused norm-and-activation layers keep their dropout and activation.
    """
    for name, child in parent.named_children():
        if not isinstance(child, _BatchNorm):
            _to_group_norm(child)
            continue
        norm = nn.GroupNorm(_groups(child.num_features), child.num_features, eps=child.eps, affine=child.affine)
        if child.affine:
            with torch.no_grad():
                norm.weight.copy_(child.weight)
                norm.bias.copy_(child.bias)
                if not child.bias.any():
                    # A still picture (a flow of zeros) has no variance at all: with biases of zero it would stay so
                    # through every layer, and each would multiply its gradient by eps ** -0.5.
                    norm.bias.normal_(std=0.1)
        rest = [module for key in ("drop", "act") if isinstance(module := getattr(child, key, None), nn.Module)]
        setattr(parent, name, nn.Sequential(norm, *rest) if rest else norm)


def _groups(channels: int) -> int:
    """Returns at most 32 groups of at least 8 channels: smaller ones turn into instance norm at small pictures."""
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 8))
