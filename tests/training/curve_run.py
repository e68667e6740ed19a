"""Pretraining on generated clips held in memory, as one of some ranks: what `test_curves` compares.

``python curve_run.py CASES.json`` fits the cases one after the other, as the rank that the environment names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.recipe import parse_recipe
from crossgate.tasks import build_task
from crossgate.training.loop import fit
from crossgate.training.world import World, current_world, leave_world

STEPS, BATCH = 30, 16


def curve_recipe(output: Path, name: str, engine: dict[str, Any] | None = None) -> Recipe:
    encoders = {name: {"backbone": "test_vit"} for name in ("rgb", "flow", "audio", "depth")}
    return parse_recipe(
        {
            "kind": "pretrain",
            "run": {"name": name, "output": str(output)},
            "data": {"global_batch": BATCH, "clip": {"size": 32, "frames": 2, "mels": 32, "seconds": 1.0}},
            "model": {"dim": 16, "embedding": 8, "encoders": encoders, "fusion": {"modality_dropout": 0.2}},
            "optim": {"lr": 1e-3},
            "engine": engine or {},
            "training": {"steps": STEPS, "log_every": 1, "save_every": STEPS},
        }
    )


def global_batch(everything: ClipBatch, number: int) -> ClipBatch:
    """The global batch of a number, whatever the ranks."""
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(number))
    return everything.select(order[:BATCH])


class MemoryLoader:
    """This rank's micro-batches out of clips in memory."""

    steps_per_epoch = STEPS

    def __init__(self, everything: ClipBatch, recipe: Recipe, world: World) -> None:
        self.everything, self.world, self.parts, self.done = everything, world, recipe.engine.accumulation, 0

    def __iter__(self) -> Iterator[ClipBatch]:
        micro = BATCH // self.world.ranks // self.parts
        while True:
            batch = global_batch(self.everything, self.done)
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
    """Fits one case: ``output``, ``name``, ``engine`` settings, and ``clips``, a file of `test_curves.clips`."""
    world, recipe = current_world(), curve_recipe(Path(case["output"]), case["name"], case["engine"])
    everything = ClipBatch(**torch.load(case["clips"], weights_only=True))
    run_dir = Path(case["output"]) / case["name"]
    fit(build_task(recipe, {}), MemoryLoader(everything, recipe, world), recipe, run_dir, world)


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case)
    leave_world()


if __name__ == "__main__":
    main()
