"""Squeeze and excitation across modalities: its formula clip by clip, absence, gradient, and every layout of maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossgate.config import ClipConfig, EncoderConfig, ExchangeConfig, FusionConfig, ModelConfig
from crossgate.errors import UserError
from crossgate.model.classifier import Classifier
from crossgate.model.exchange import Exchange
from crossgate.model.network import MultimodalNetwork
from crossgate.model.store import ModelCard, load_encoders, load_model, save_model
from crossgate.recipe import parse_recipe

CLIP = ClipConfig(size=32, frames=2, mels=32, seconds=0.5)
BACKBONES = {"rgb": "test_vit", "flow": "test_convnext", "audio": "test_vit", "depth": "test_convnext"}


def network(exchange: str = "mmtm", clip: ClipConfig = CLIP, **settings: object) -> MultimodalNetwork:
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16,
        embedding=8,
        encoders={name: EncoderConfig(backbone=BACKBONES[name]) for name in clip.modalities},
        exchange=ExchangeConfig(name=exchange),
        fusion=FusionConfig(name="mean", **settings),
    )
    return MultimodalNetwork(config, clip, 3)


def loud(model: MultimodalNetwork) -> MultimodalNetwork:
    """With excitations far from 1, so that what is wrong is seen."""
    assert model.exchange is not None
    with torch.no_grad():
        for layer in model.exchange.excite:
            layer.weight.normal_(std=3.0)
    return model


def clips(batch: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    streams = {name: torch.randn(batch, *CLIP.shape(name), generator=draw) for name in CLIP.modalities}
    present = torch.rand(batch, 4, generator=draw) > 0.3
    present[0], present[1] = True, False
    return streams, present


def test_it_is_the_formula_clip_by_clip() -> None:
    torch.manual_seed(0)
    exchange = Exchange(ExchangeConfig(name="mmtm", ratio=4), [6, 10]).double()
    assert exchange.squeeze.out_features == 2 * 16 // 4
    maps = [torch.randn(4, 3, 5, 6).double(), torch.randn(4, 1, 2, 10).double()]
    seen = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    found = exchange(maps, seen)
    for i in range(4):
        parts = [maps[m][i].reshape(-1, maps[m].shape[-1]).mean(0) * float(seen[i, m]) for m in range(2)]
        z = (exchange.squeeze.weight @ torch.cat(parts) + exchange.squeeze.bias).clamp(min=0)
        for m in range(2):
            factor = 2 / (1 + torch.exp(-(exchange.excite[m].weight @ z + exchange.excite[m].bias)))
            torch.testing.assert_close(found[m][i], maps[m][i] * factor, rtol=1e-9, atol=1e-12)


def test_excitations_of_one_give_the_encoders_without_it() -> None:
    """So pooling, layouts and norms are the backbone's own, for tokens and for maps."""
    model, (streams, present) = network().eval(), clips()
    assert model.exchange is not None
    with torch.no_grad():
        for layer in model.exchange.excite:
            layer.weight.zero_()
    plain = network("none").eval()
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("exchange.")}
    plain.load_state_dict(kept)
    torch.testing.assert_close(model.encode(streams, present), plain.encode(streams, present), rtol=1e-5, atol=1e-5)


def test_absent_modalities_say_nothing_and_the_present_are_heard() -> None:
    model, (streams, present) = loud(network()).eval(), clips()
    clean = model.encode(streams, present)
    dirty = {
        n: s.masked_fill(~present[:, m].view(-1, 1, 1, 1, 1), torch.nan) for m, (n, s) in enumerate(streams.items())
    }
    torch.testing.assert_close(model.encode(dirty, present), clean, rtol=0, atol=0)
    assert clean[~present].abs().sum() == 0
    without = present.clone()
    without[0, 2] = False  # the first clip has all four: its other features change when it loses one
    changed = (model.encode(streams, without)[0, 0] - clean[0, 0]).abs().max()
    assert changed > 1e-3


def test_a_clip_without_a_modality_is_that_of_a_model_without_it() -> None:
    model, (streams, present) = loud(network()).eval(), clips()
    present[:], present[:, 2] = True, False
    small = ClipConfig(**CLIP.model_dump() | {"modalities": ("rgb", "flow", "depth")})
    other, widths = network(clip=small).eval(), [len(layer.bias) for layer in model.exchange.excite]
    keep = torch.cat([torch.full((w,), m != 2) for m, w in enumerate(widths)])
    with torch.no_grad():
        other.encoders.load_state_dict(
            {n: v for n, v in model.encoders.state_dict().items() if not n.startswith("audio.")}
        )
        other.exchange = Exchange(ExchangeConfig(), [w for m, w in enumerate(widths) if m != 2])
        other.exchange.squeeze.weight = torch.nn.Parameter(model.exchange.squeeze.weight[:, keep])
        other.exchange.squeeze.bias = model.exchange.squeeze.bias
        other.exchange.excite = torch.nn.ModuleList(model.exchange.excite[m] for m in (0, 1, 3))
        less = other.encode({n: s for n, s in streams.items() if n != "audio"}, present[:, [0, 1, 3]])
    torch.testing.assert_close(less, model.encode(streams, present)[:, [0, 1, 3]], rtol=1e-6, atol=1e-6)


def test_gradient_reaches_every_parameter_also_where_a_modality_is_nowhere() -> None:
    model, (streams, present) = network(), clips()
    model(streams, present).fused.square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    present[:, 2] = False
    model(streams, present).fused.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() == 0 for p in model.encoders["audio"].parameters())


def test_a_modality_hidden_by_dropout_has_no_say_either() -> None:
    model, (streams, present) = loud(network(modality_dropout=0.5)).train(), clips()
    present[:] = True
    draws = torch.tensor([[0.9, 0.1, 0.9, 0.9]]).expand(5, 4)
    before = Classifier(model, ("a", "b", "c"))(streams, present, draws).features
    after = Classifier(model, ("a", "b", "c"))(streams | {"flow": streams["flow"] + 1}, present, draws).features
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [0, 2, 3]], rtol=0, atol=0)
    assert not torch.equal(after[:, 1], before[:, 1])


def test_activations_can_be_recomputed_and_bf16_works() -> None:
    model, (streams, present) = network(), clips()
    expected = model(streams, present).fused
    model.checkpoint_activations()
    found = model(streams, present).fused
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert model(streams, present).fused.isfinite().all()
    assert model.bfloat16()(streams, present).fused.isfinite().all()


def test_it_is_saved_with_the_model_and_taken_by_one_like_it(tmp_path: Path) -> None:
    model, (streams, present) = Classifier(loud(network()), ("a", "b", "c")).eval(), clips()
    card = ModelCard(kind="classifier", clip=CLIP, model=model.network.config, classes=("a", "b", "c"), task="action")
    save_model(tmp_path / "model", model, card)
    loaded = load_model(tmp_path / "model")[0].eval()
    torch.testing.assert_close(loaded(streams, present).logits, model(streams, present).logits, rtol=0, atol=0)
    taken = load_encoders(network(), tmp_path / "model")
    assert "exchange.squeeze.weight" in taken.loaded
    assert "exchange" in load_encoders(network("none"), tmp_path / "model").skipped


@pytest.mark.parametrize("kind", ["pretrain", "study", "frozen"])
def test_it_is_refused_where_it_cannot_learn(kind: str) -> None:
    tree = {"kind": "finetune" if kind == "frozen" else kind, "model": {"exchange": {"name": "mmtm"}}}
    with pytest.raises(UserError, match=r"model\.exchange"):
        parse_recipe(tree | ({"finetune": {"freeze": True}} if kind == "frozen" else {}))
