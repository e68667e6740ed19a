"""Trials on planted features: three modalities that each tell the class, one of them noise for half of the clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.runs import context, finetune
from crossgate.runs.context import PARTS, RunContext
from crossgate.stream.index import SplitInfo

NAMES = ("rgb", "flow", "audio")
GATE = "model.fusion.name"
CLASSES, DIM, EACH, NOISE = 4, 24, 4, 6.0
GROUPS = {"train": 1000, "val": 1000, "test": 1}
SPREAD = {"rgb": 1.0, "flow": 5.0, "audio": 5.0}


def tree(output: Path, kind: str, **keys: Any) -> dict[str, Any]:
    """A search's recipe, `keys` being those of its space and trials; `kind` is noisy or clean."""
    return {
        "kind": "search",
        "run": {"name": kind, "output": str(output)},
        "data": {"global_batch": 60, "clip": {"modalities": list(NAMES), "frames": 1, "size": 32, "mels": 32}},
        "model": {"dim": DIM, "encoders": {name: {"backbone": "test_convnext"} for name in NAMES}},
        "finetune": {"task": "action", "freeze": True, "features": str(output / kind), "unimodal_weight": 0.3},
        "optim": {"lr": 0.01},
        "training": {"steps": 200, "eval_every": 40, "log_every": 200, "save_every": 200},
        "cluster": {"address": "local"},
        "search": {"space": {GATE: ["mean", "softmax"]}, "concurrent": 2, "seeds": 2, "finalists": 1, **keys},
    }


class PlantedIndex:
    """As much of an index as a trial asks for."""

    digest = "planted"
    vocabularies = {"action": [f"class{k}" for k in range(CLASSES)]}
    splits = {name: SplitInfo(1, groups * EACH, groups) for name, groups in GROUPS.items()}
    modalities = dict.fromkeys(NAMES, 1)

    class store:
        url = "memory"

    def class_counts(self, splits: Any) -> dict[str, list[int]]:
        return {"action": [99] * CLASSES}

    def strays(self) -> list[str]:
        return []


def clips(part: str, noisy: bool) -> ClipBatch:
    """Clips of a part; `noisy`: rgb of every other clip is noise alone, loud enough to drown the others in a mean."""
    source = torch.Generator().manual_seed(PARTS.index(part))  # type: ignore[arg-type]
    prototypes = torch.randn(len(NAMES), CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    count = GROUPS[part] * EACH
    labels = torch.randint(0, CLASSES, (count,), generator=source)
    streams = {}
    for m, name in enumerate(NAMES):
        streams[name] = prototypes[m, labels] + SPREAD[name] * torch.randn(count, DIM, generator=source)
        if noisy and name == "rgb":
            drowned = torch.arange(count) % 2 == 0
            streams[name][drowned] = NOISE * torch.randn(int(drowned.sum()), DIM, generator=source)
    return ClipBatch(
        modalities=NAMES,
        streams=streams,
        present=torch.ones(count, len(NAMES), dtype=torch.bool),
        group=torch.arange(count) // EACH,
        labels={"action": labels},
        degraded=torch.zeros(count, len(NAMES)),
        clip=torch.arange(count),
        keys=[f"{part}{i:04d}" for i in range(count)],
    )


def run_trial(recipe: Recipe, heard: Any, parent: str, **pause: int) -> dict[str, Any]:
    """A real trial, whose features come from here; `finetune.features` says which."""
    marker = Path(recipe.run.output) / f"{recipe.run.name}.started"
    marker.write_text(marker.read_text() + "x" if marker.exists() else "x")
    noisy = recipe.finetune.features.endswith("noisy")

    def plant(network: Any, run: RunContext, parts: Any) -> None:
        run.kept.update({part: clips(part, noisy) for part in parts})

    context.open_index = lambda recipe: PlantedIndex()  # type: ignore[assignment, return-value]
    finetune.keep_features = plant
    return finetune.run_trial(recipe, heard, parent, **pause)
