"""Gates on the generated clips of `make demo`, a third of them spoiled in a way that is known: weights fall with it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from crossgate.batch import ClipBatch
from crossgate.config import FusionConfig, OptimConfig, StudyConfig
from crossgate.evaluation.gates import varies
from crossgate.model.fusion import FUSIONS
from crossgate.runs.features import _read
from crossgate.tasks.gates import Clips, Setting, out_of_fold, scored, train_gate, train_heads

FEATURES = Path(__file__).resolve().parents[2] / "demo" / "features"
SEEDS, SPOILED = 2, 0.3  # of a severity between 0 and 1
UNWEIGHED = {"context", "film", "kiela", "flow_gate"}  # gates of channels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts() -> dict[str, ClipBatch]:
    """The features of the pretrained encoders, labelled clips only, standardised by the training clips."""
    if not FEATURES.exists():
        assert "CI" not in os.environ, "run `make demo` first"
        pytest.skip("run `make demo` first")
    tables = {part: _read(next(FEATURES.glob(f"{part}-*.safetensors"))) for part in ("train", "val", "test")}
    tables = {
        part: table.select(torch.nonzero(table.labels["action"] >= 0).squeeze(1)) for part, table in tables.items()
    }
    for m, name in enumerate(tables["train"].modalities):
        seen = tables["train"].streams[name][tables["train"].present[:, m]]
        for table in tables.values():
            table.streams[name] = (table.streams[name] - seen.mean(0)) / (seen.std(0) + 1e-6)
    return tables


def test_every_gate_trusts_spoiled_sound_less(parts: dict[str, ClipBatch]) -> None:
    names = parts["train"].modalities
    data = {
        part: Clips(
            torch.stack([table.streams[name] for name in names], dim=1),
            table.present,
            table.labels["action"],
            table.group,
        )
        for part, table in parts.items()
    }
    setting = Setting(StudyConfig(steps=150, eval_every=15), OptimConfig(), FusionConfig(), 12)
    spoiled = parts["test"].degraded.numpy() > SPOILED
    falls: dict[str, list[np.ndarray]] = {}
    for seed in range(SEEDS):
        heads = train_heads(data["train"], data["val"], setting, seed)
        folded = out_of_fold(data["train"], data["val"], setting, seed)
        val, test = scored(heads, data["val"]), scored(heads, data["test"])
        here = test.present.numpy()
        for name in [name for name, one in FUSIONS.items() if one.kind == "gate" and name not in UNWEIGHED]:
            gate = train_gate(name, names, folded, val, setting, seed).eval()
            with torch.no_grad():
                weights = gate(test)[1]
            assert weights is not None and varies(weights.numpy(), here), name
            each = zip(weights.numpy().T, here.T, spoiled.T)
            falls.setdefault(name, []).append(
                np.array([weight[has & ~bad].mean() - weight[has & bad].mean() for weight, has, bad in each])
            )
    means = {name: np.mean(each, axis=0) for name, each in falls.items()}
    said = "\n".join(f"{name}: {dict(zip(names, each.round(3)))}" for name, each in means.items())
    sound = names.index("audio")
    # Sound is what an action is known by here; of modalities that tell little, little trust can be lost.
    assert all(each[sound] > 0.02 for each in means.values()), said
    assert all(each.mean() > 0 for each in means.values()), said
