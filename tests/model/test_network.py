"""The network and the two models on it: what is absent changes nothing, and nothing breaks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossgate.config import ClipConfig, EncoderConfig, FusionConfig, ModelConfig
from crossgate.model.classifier import Classifier
from crossgate.model.contrastive import LARGEST_SCALE, ContrastiveModel, Scale
from crossgate.model.fusion import FUSIONS, Fusion, FusionInput, FusionOutput
from crossgate.model.fusion.base import mix, uniform_weights
from crossgate.model.network import MultimodalNetwork

B = 6
CLIP = ClipConfig(size=32, frames=2, mels=32, seconds=0.5)


def config(fusion: str = "softmax", modality_dropout: float = 0.0) -> ModelConfig:
    return ModelConfig(
        dim=16,
        embedding=8,
        encoders={name: EncoderConfig(backbone="test_vit") for name in CLIP.modalities},
        fusion=FusionConfig(name=fusion, hidden=8, modality_dropout=modality_dropout),
    )


def network(fusion: str = "softmax", modality_dropout: float = 0.0, classes: int | None = None) -> MultimodalNetwork:
    torch.manual_seed(0)
    return MultimodalNetwork(config(fusion, modality_dropout), CLIP, classes)


def clips(batch: int = B) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    streams = {name: torch.randn(batch, *CLIP.shape(name), generator=draw) for name in CLIP.modalities}
    streams["rgb"] = torch.randint(0, 256, (batch, *CLIP.shape("rgb")), dtype=torch.uint8, generator=draw)
    present = torch.rand(batch, 4, generator=draw) > 0.3
    present[0], present[1] = True, False
    return streams, present


def test_what_absent_rows_hold_is_never_seen() -> None:
    model, (streams, present) = network(), clips()
    clean = model(streams, present)
    for m, name in enumerate(CLIP.modalities):
        rubbish = 255 if name == "rgb" else torch.nan
        streams[name] = streams[name].clone()
        streams[name][~present[:, m]] = rubbish
    dirty = model(streams, present)
    torch.testing.assert_close(dirty.fused, clean.fused, rtol=0, atol=0)
    assert dirty.features[~present].abs().sum() == 0
    dirty.fused.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_absent_clips_give_their_encoder_no_gradient_yet_a_tensor_for_the_collective() -> None:
    model, (streams, present) = network(), clips()
    present[:, CLIP.modalities.index("audio")] = False
    model(streams, present).fused.square().sum().backward()
    for name, parameter in model.encoders["audio"].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name


def test_a_gradient_equals_that_of_the_clips_that_have_the_modality() -> None:
    model, (streams, present) = network(), clips()
    here = present[:, 0]
    loss = model.encode(streams, present)[:, 0].square().sum()
    weight = model.encoders["rgb"].project.weight
    (masked,) = torch.autograd.grad(loss, weight)
    (removed,) = torch.autograd.grad(model.encoders["rgb"](streams["rgb"][here]).square().sum(), weight)
    torch.testing.assert_close(masked, removed, rtol=1e-4, atol=1e-5)


def test_modality_dropout_keeps_one_and_is_off_in_evaluation() -> None:
    model = network(modality_dropout=0.9)
    present = torch.rand(500, 4) > 0.4
    hidden = model.hide(present)
    assert not (hidden & ~present).any()
    assert torch.equal(hidden.any(1), present.any(1))
    several = present.sum(1) > 1
    assert hidden[several].sum() < 0.6 * present[several].sum()
    assert torch.equal(model.eval().hide(present), present)


def test_modality_dropout_hides_at_its_rate_and_follows_the_draws_given() -> None:
    model = network(modality_dropout=0.25)
    everything = torch.ones(4000, 4, dtype=torch.bool)
    assert model.hide(everything).float().mean().item() == pytest.approx(0.75, abs=0.03)
    draws = torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.1, 0.2, 0.05, 0.0]])
    expected = torch.tensor([[True, False, True, False], [False, True, False, False]])
    assert torch.equal(model.hide(everything[:2], draws), expected)


def test_frozen_encoders_stay_in_evaluation_mode_and_get_no_gradient() -> None:
    model, (streams, present) = network(), clips()
    model.freeze_encoders()
    model.train()
    assert model.training
    assert not any(module.training for module in model.encoders.modules())
    model(streams, present).fused.square().sum().backward()
    assert all(p.grad is None for p in model.encoders.parameters())
    assert all(p.grad is not None for p in model.fusion.parameters())


@pytest.mark.parametrize("fusion", sorted(name for name, kind in FUSIONS.items() if not kind.needs_logits))
def test_contrastive_model(fusion: str) -> None:
    torch.manual_seed(0)
    model, (streams, present) = ContrastiveModel(network(fusion)), clips()
    output = model(streams, present)
    assert output.embeddings.shape == (B, 4, 8)
    assert output.targets.shape == (B, 4, 8)
    torch.testing.assert_close(output.embeddings.norm(dim=-1), torch.ones(B, 4))
    assert not output.target_present[1].any()
    assert output.scale.item() == pytest.approx(1 / 0.07, rel=1e-4)


def test_a_target_does_not_see_the_modality_that_it_is_contrasted_with() -> None:
    model, (streams, present) = ContrastiveModel(network()), clips()
    present[:] = True
    before = model(streams, present).targets
    streams["audio"] = streams["audio"] + 5
    after = model(streams, present).targets
    audio = CLIP.modalities.index("audio")
    torch.testing.assert_close(after[:, audio], before[:, audio])
    assert not torch.allclose(after[:, 0], before[:, 0], atol=1e-4)


def test_a_target_needs_another_modality() -> None:
    model, (streams, present) = ContrastiveModel(network()), clips()
    present[0] = torch.tensor([False, True, False, False])
    assert not model(streams, present).target_present[0].any()
    present[0] = torch.tensor([False, True, False, True])
    assert model(streams, present).target_present[0].tolist() == [False, True, False, True]


def test_scale_stays_bounded_and_never_loses_its_gradient() -> None:
    scale = Scale(0.07, learn=True)
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        scale.raw.fill_(-8.0)
    value = scale()
    assert 0.99 * LARGEST_SCALE < value.item() <= LARGEST_SCALE
    value.backward()
    assert scale.raw.grad is not None
    assert scale.raw.grad.item() < 0
    assert math.isfinite(Scale(0.001, learn=False)().item())
    assert not list(p for p in Scale(0.07, learn=False).parameters() if p.requires_grad)


def test_classifier_with_a_fusion_that_mixes_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interface that later gates use: no line of the network knows them."""

    class Average(Fusion):
        needs_logits = True

        def forward(self, clip: FusionInput) -> FusionOutput:
            assert clip.logits is not None
            weights = uniform_weights(clip.present)
            return FusionOutput(logits=mix(clip.logits, weights), weights=weights)

    monkeypatch.setitem(FUSIONS, "average", Average)
    model, (streams, present) = Classifier(network("average", classes=3), ("a", "b", "c")), clips()
    output = model(streams, present)
    expected = torch.stack([output.unimodal_logits[b][present[b]].sum(0) / max(1, present[b].sum()) for b in range(B)])
    torch.testing.assert_close(output.logits, expected)
    assert output.fused.shape == (B, 16)
    assert model.head is None


def test_whole_network_in_bf16() -> None:
    model, (streams, present) = Classifier(network(), ("a", "b")).bfloat16(), clips()
    output = model(streams, present)
    assert output.logits.isfinite().all()
    output.logits.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_standardised_features_have_mean_zero_and_deviation_one_and_stay_so() -> None:
    net = network().eval()
    streams, present = clips(12)
    raw = net.raw_features(streams, present).detach()
    assert torch.equal(net.encode(streams, present), raw)
    net.standardise(raw, present)
    features = net.encode(streams, present).detach()
    for m in range(4):
        own, before = features[present[:, m], m], raw[present[:, m], m].std(0)
        assert own.mean(0).abs().max() < 1e-3
        assert torch.allclose(own.std(0), before / (before + 1e-3), atol=1e-3)
    assert (features[~present] == 0).all()
    mean = net.feature_mean.clone()
    net.standardise(raw * 2, present)  # heads were trained on the first: it stays
    assert torch.equal(net.feature_mean, mean)


def test_raw_features_take_the_place_of_streams() -> None:
    net = network().eval()
    streams, present = clips(5)
    raw = net.raw_features(streams, present)
    net.standardise(raw.detach(), present)
    again = net.encode({name: raw[:, m] for m, name in enumerate(net.modalities)}, present)
    assert torch.allclose(again, net.encode(streams, present), atol=1e-6)
