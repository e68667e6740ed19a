"""Encoders over several families of backbones at small sizes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crossgate.config import EncoderConfig
from crossgate.errors import UserError
from crossgate.modality import MODALITIES
from crossgate.model.backbones import build_backbone
from crossgate.model.encoders import Encoder
from crossgate.model.temporal import build_temporal

BACKBONES = [
    ("test_vit", "keep"),
    ("test_convnext", "keep"),
    ("convnext_atto", "keep"),
    ("vit_tiny_patch16_224", "keep"),
    ("resnet10t", "group"),
    ("mobilenetv4_conv_small_050", "group"),
]


@pytest.mark.parametrize(("name", "norm"), BACKBONES)
@pytest.mark.parametrize(("modality", "shape"), [("flow", (2, 2, 32, 32)), ("audio", (1, 1, 32, 96))])
def test_backbones_at_any_size(name: str, norm: str, modality: str, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(modality, EncoderConfig(backbone=name, norm=norm), shape, 24)
    clips = torch.randn(3, *shape)
    features = encoder(clips)
    assert features.shape == (3, 24)
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    with torch.no_grad():  # no clip leans on its neighbours, in training mode either
        torch.testing.assert_close(encoder(clips[1:2]), features[1:2], rtol=1e-4, atol=1e-5)


def test_standardises_in_the_unit_of_the_modality() -> None:
    encoder = Encoder("rgb", EncoderConfig(backbone="test_vit", temporal="mean"), (1, 3, 32, 32), 8)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mean = torch.tensor(MODALITIES["rgb"].mean).round().to(torch.uint8)
    encoder(mean.view(1, 1, 3, 1, 1).expand(1, 1, 3, 32, 32))
    assert seen[0].abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
def test_any_dtype_comes_in(dtype: torch.dtype) -> None:
    encoder = Encoder("depth", EncoderConfig(backbone="test_vit"), (2, 1, 32, 32), 8)
    stream = torch.randint(0, 5, (2, 2, 1, 32, 32)).to(dtype)
    assert torch.equal(encoder(stream), encoder(stream.float()))


def test_bf16_weights() -> None:
    encoder = Encoder("rgb", EncoderConfig(backbone="test_convnext"), (2, 3, 32, 32), 8)
    stream = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    exact = encoder(stream)
    low = encoder.bfloat16()(stream)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.1, atol=0.15)


def test_batch_norm_is_refused_by_name_of_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.encoders\.flow\.norm.*convnext_atto.*norm=group"):
        build_backbone("flow", EncoderConfig(backbone="resnet10t"), (2, 32, 32))


def test_group_norm_keeps_activation_and_affine_parameters() -> None:
    backbone, width = build_backbone("rgb", EncoderConfig(backbone="mobilenetv3_small_050", norm="group"), (3, 32, 32))
    kinds = [type(module).__name__ for module in backbone.modules()]
    assert not any("BatchNorm" in kind for kind in kinds)
    assert {"GroupNorm", "Hardswish"} <= set(kinds)
    assert width == 1024
    groups = [module for module in backbone.modules() if isinstance(module, nn.GroupNorm)]
    assert all(g.num_channels // g.num_groups >= 8 or g.num_groups == 1 for g in groups)


def test_unknown_backbone_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"encoders\.rgb\.backbone.*'convnext_atom'.*did you mean 'convnext_atto"):
        build_backbone("rgb", EncoderConfig(backbone="convnext_atom"), (3, 32, 32))
    with pytest.raises(UserError, match="try convnext_atto"):
        build_backbone("rgb", EncoderConfig(backbone="qqqqqqqqqqqqqq"), (3, 32, 32))


def test_weights_from_elsewhere_are_no_backbone_name() -> None:
    with pytest.raises(UserError, match="unknown backbone"):
        build_backbone("rgb", EncoderConfig(backbone="hf-hub:someone/something"), (3, 32, 32))


def test_a_size_that_the_backbone_cannot_take() -> None:
    with pytest.raises(UserError, match=r"model\.encoders\.rgb\.backbone.*3 channels of 8 x 8"):
        build_backbone("rgb", EncoderConfig(backbone="vit_tiny_patch16_224"), (3, 8, 8))


def test_a_backbone_that_refuses_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def refuse(*args: object, in_chans: int, **kwargs: object) -> None:
        raise TypeError("got an unexpected keyword argument 'in_chans'")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match=r"model\.encoders\.flow\.backbone.*does not take 2 channels.*in_chans"):
        build_backbone("flow", EncoderConfig(backbone="convnext_atto"), (2, 32, 32))


@pytest.mark.parametrize("kind", ["mean", "attention", "gru"])
def test_temporal_pooling(kind: str) -> None:
    torch.manual_seed(0)
    pooling, frames = build_temporal(kind, 12, 5), torch.randn(3, 5, 12, requires_grad=True)
    pooled = pooling(frames)
    assert pooled.shape == (3, 12)
    pooled.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pooling.parameters())
    knows_order = not torch.allclose(pooled, pooling(frames.flip(1)), atol=1e-6)
    assert knows_order == (kind != "mean")


def test_one_frame_needs_no_pooling_parameters() -> None:
    assert not list(build_temporal("gru", 12, 1).parameters())


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "resnet10t"])
def test_a_still_picture_gives_no_exploding_gradient(backbone: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder("flow", EncoderConfig(backbone=backbone, norm="group"), (4, 2, 64, 64), 32)
    encoder(torch.zeros(4, 4, 2, 64, 64)).square().sum().backward()
    still = max(p.grad.norm().item() for p in encoder.parameters() if p.grad is not None)
    encoder.zero_grad()
    encoder(torch.randn(4, 4, 2, 64, 64)).square().sum().backward()
    moving = max(p.grad.norm().item() for p in encoder.parameters() if p.grad is not None)
    assert still < 100 * moving
