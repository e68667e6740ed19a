"""Pretraining on generated clips held in memory, as one of some ranks: what `test_curves` compares.

``python curve_run.py CASES.json`` fits the cases one after the other, as the rank that the environment names;
``python curve_run.py CASES.json --ray`` each of them by two ranks of a Ray of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from crossgate.batch import ClipBatch
from crossgate.cluster.ray_train import launch
from crossgate.config import ClusterConfig, Recipe
from crossgate.recipe import parse_recipe
from crossgate.tasks import Task, build_task
from crossgate.training.loop import fit
from crossgate.training.world import World, current_world, leave_world

STEPS, BATCH, CLASSES = 30, 16, 12


def curve_recipe(output: Path, name: str, engine: dict[str, Any] | None = None, exchange: bool = False) -> Recipe:
    """Returns pretraining; with `exchange`, fine-tuning of encoders that learn of one another, tokens beside maps."""
    backbones = {name: "test_vit" for name in ("rgb", "flow", "audio", "depth")}
    backbones |= {"flow": "test_convnext", "depth": "test_convnext"} if exchange else {}
    encoders = {name: {"backbone": backbone} for name, backbone in backbones.items()}
    return parse_recipe(
        {
            "kind": "finetune" if exchange else "pretrain",
            "run": {"name": name, "output": str(output)},
            "data": {"global_batch": BATCH, "clip": {"size": 32, "frames": 2, "mels": 32, "seconds": 1.0}},
            "model": {
                "dim": 16,
                "embedding": 8,
                "encoders": encoders,
                "fusion": {"modality_dropout": 0.2},
                "exchange": {"name": "mmtm" if exchange else "none"},
            },
            "optim": {"lr": 1e-3},
            "engine": engine or {},
            "training": {"steps": STEPS, "log_every": 1, "save_every": STEPS},
        }
    )


def curve_task(recipe: Recipe) -> Task:
    """Returns what the recipe trains. Excitations that start near 1 would hardly be missed: these do not."""
    task = build_task(recipe, {"action": [str(number) for number in range(CLASSES)]})
    exchange = task.model.network.exchange
    with torch.no_grad():
        for layer in exchange.excite if exchange is not None else ():
            layer.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    return task


def global_batch(everything: ClipBatch, number: int, absences: bool = False) -> ClipBatch:
    """The global batch of a number, whatever the ranks.

    With `absences`, of every three batches one lacks sound in the first half of its clips, all that the first of two
    ranks has; one lacks depth everywhere; in the third the last clip has nothing.
    """
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(number))
    batch = everything.select(order[:BATCH])
    if absences:
        rows = (slice(0, BATCH // 2), slice(None), slice(BATCH - 1, None))[number % 3]
        lost = ("audio",), ("depth",), batch.modalities
        batch.present[rows, [batch.modalities.index(name) for name in lost[number % 3]]] = False
    return batch


class MemoryLoader:
    """This rank's micro-batches out of clips in memory."""

    steps_per_epoch = STEPS

    def __init__(self, everything: ClipBatch, recipe: Recipe, world: World, absences: bool) -> None:
        self.absences = absences
        self.everything, self.world, self.parts, self.done = everything, world, recipe.engine.accumulation, 0

    def __iter__(self) -> Iterator[ClipBatch]:
        micro = BATCH // self.world.ranks // self.parts
        while True:
            batch = global_batch(self.everything, self.done, self.absences)
            self.done += 1
            for part in range(self.parts):
                start = (self.world.rank * self.parts + part) * micro
                yield batch.select(slice(start, start + micro))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["step"]

    def settle(self, gather: Any) -> None:
        pass

    def meters(self) -> dict[str, float]:
        return {}


def run_case(case: dict[str, Any]) -> None:
    """Fits one case: ``output``, ``name``, ``engine`` settings, ``clips``, a file of `test_curves.clips`, and maybe
    ``exchange``: as `curve_recipe`, with clips that lack modalities."""
    world, exchange = current_world(), case.get("exchange", False)
    recipe = curve_recipe(Path(case["output"]), case["name"], case["engine"], exchange)
    everything = ClipBatch(**torch.load(case["clips"], weights_only=True))
    run_dir = Path(case["output"]) / case["name"]
    fit(curve_task(recipe), MemoryLoader(everything, recipe, world, exchange), recipe, run_dir, world)


def run_case_on_ray(case: dict[str, Any]) -> None:
    """Fits one case by two ranks that Ray Train starts."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for Ray's workers
    recipe = curve_recipe(Path(case["output"]), case["name"], case["engine"])
    recipe.cluster = ClusterConfig(address="local", workers=2, launcher="ray")  # the tests' own Ray may lack room
    assert launch(recipe, "curve_run:on_ray", {"case": case}) == {"ranks": 2}


def on_ray(recipe: Recipe, case: dict[str, Any]) -> dict[str, Any]:
    """Entry of a rank on Ray Train."""
    run_case(case)
    return {"ranks": current_world().ranks}


def main() -> None:
    run = run_case_on_ray if "--ray" in sys.argv else run_case
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case)
    leave_world()


if __name__ == "__main__":
    main()
