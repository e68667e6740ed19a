"""Streams and gate that were trained apart answer alike once they are one model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crossgate.config import ClipConfig, FusionConfig, ModelConfig, OptimConfig, StudyConfig
from crossgate.model.fusion import FUSIONS
from crossgate.model.network import MultimodalNetwork
from crossgate.tasks.gates import Clips, Setting, scored, train_gate, train_heads
from crossgate.tasks.staged import staged

NAMES, CLASSES, DIM = ("rgb", "flow", "audio"), ("a", "b", "c"), 16
SETTING = Setting(StudyConfig(steps=3, batch=16, eval_every=1), OptimConfig(lr=0.02), FusionConfig(hidden=8), 3)


@pytest.fixture(scope="module")
def network() -> MultimodalNetwork:
    encoders = {name: {"backbone": "test_vit"} for name in NAMES}
    config = ModelConfig.model_validate({"dim": DIM, "embedding": 8, "encoders": encoders, "fusion": {"name": "mean"}})
    return MultimodalNetwork(config, ClipConfig(modalities=NAMES, frames=2, size=32, mels=32, seconds=1.0)).eval()


@pytest.mark.parametrize("name", FUSIONS)
def test_the_whole_answers_as_its_parts_do(network: MultimodalNetwork, name: str) -> None:
    rng = torch.Generator().manual_seed(1)
    streams = {one: 3 + 2 * torch.randn(32, DIM, generator=rng) for one in NAMES}  # raw features, as they are kept
    present = torch.rand(32, 3, generator=rng) < 0.8
    network.standardise(torch.stack([streams[one] for one in NAMES], dim=1), present)
    with torch.no_grad():
        features = network.encode(streams, present)
    clips = Clips(features, present, torch.randint(3, (32,), generator=rng), torch.arange(32))
    heads = train_heads(clips, clips, SETTING, seed=0)
    setting = replace(SETTING, fusion=SETTING.fusion.model_copy(update={"weights": (1.0, 2.0, 0.5)}))
    seen = scored(heads, clips)
    gate = train_gate(name, NAMES, seen, seen, setting, seed=0)

    model = staged(network, heads, gate, CLASSES)
    with torch.no_grad():
        whole, (logits, weights, _) = model(streams, present), gate(seen)
    torch.testing.assert_close(whole.logits, logits)
    torch.testing.assert_close(whole.features, features)
    here = present.unsqueeze(-1)
    torch.testing.assert_close(whole.unimodal_logits * here, seen.scores * here)
    if weights is not None:
        torch.testing.assert_close(whole.weights, weights)
    assert model.classes == CLASSES and model.network.config.fusion.name == name
