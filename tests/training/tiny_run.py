"""A tiny task, an in-memory loader and a main that fits cases: what the tests of training and cluster run.

``python tiny_run.py CASES.json`` fits the cases one after the other in this process, as the rank that the
environment names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossgate.config import OptimConfig, Recipe
from crossgate.errors import Unreachable, UserError
from crossgate.recipe import Stretch, parse_recipe, stretches
from crossgate.training.loop import FitResult, Selection, fit
from crossgate.training.metrics import read_metrics
from crossgate.training.world import World, current_world, leave_world

CLASSES, WIDTH, STEPS_PER_EPOCH = 4, 12, 6


@dataclass
class TinyBatch:
    x: Tensor
    y: Tensor
    keys: list[str]

    def to(self, device: torch.device) -> TinyBatch:
        return TinyBatch(self.x.to(device), self.y.to(device), self.keys)

    def pin_memory(self) -> TinyBatch:
        return TinyBatch(self.x.pin_memory(), self.y.pin_memory(), self.keys)


class Crash(Exception):
    """Ends a start of a run, but not the process."""


class TinyModel(nn.Module):
    """Norm, a scalar without dimension, a buffer and a frozen part: what real tasks have."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 24), nn.LayerNorm(24), nn.GELU())
        self.head = nn.Linear(24, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mean", torch.full((WIDTH,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.frozen(x - self.mean))) * self.scale


class TinyTask(nn.Module):
    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = TinyModel()
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: TinyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(self.dropout(batch.x))
        loss = nn.functional.cross_entropy(logits.float(), batch.y)
        hits = (logits.argmax(1) == batch.y).float().mean()
        return loss, {"accuracy": hits.detach(), "rare": torch.full((), float("nan"))}

    def predict(self, batch: TinyBatch) -> Tensor:
        return self.model(batch.x)

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.ndim > 1], "lr": optim.lr, "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "lr": optim.lr * 0.3, "weight_decay": 0.0},
        ]


def global_batch(number: int, size: int) -> TinyBatch:
    """The global batch of a number, whatever the ranks."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(size, WIDTH, generator=generator)
    return TinyBatch(x, (x[:, :CLASSES]).argmax(1), [f"clip-{number}-{row}" for row in range(size)])


class TinyLoader:
    """This rank's micro-batches, for ever, from a state that counts whole steps."""

    steps_per_epoch = STEPS_PER_EPOCH

    def __init__(self, recipe: Recipe, world: World, on_step=None, poison: Collection[int] = ()) -> None:
        self.size, self.accumulation = recipe.data.global_batch, recipe.engine.accumulation
        self.world, self.done, self.on_step, self.poison = world, 0, on_step, poison

    def __iter__(self):
        while True:
            if self.on_step:
                self.on_step(self.done + 1)
            batch = global_batch(self.done, self.size)
            if self.done + 1 in self.poison:
                batch.x[-1] = float("nan")
            share = self.size // self.world.ranks
            micro = share // self.accumulation
            for part in range(self.accumulation):
                if part + 1 == self.accumulation:
                    self.done += 1
                start = self.world.rank * share + part * micro
                rows = slice(start, start + micro)
                yield TinyBatch(batch.x[rows], batch.y[rows], batch.keys[rows])

    def state_dict(self):
        epoch, step = divmod(self.done, self.steps_per_epoch)
        return {"version": 1, "epoch": epoch, "step": step}

    def load_state_dict(self, state) -> None:
        self.done = state["epoch"] * self.steps_per_epoch + state["step"]

    def settle(self, gather) -> None:
        pass

    def meters(self) -> dict[str, float]:
        return {"skipped": 0.0}


def tiny_recipe(output: Path, name: str, **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {
        "kind": "finetune",
        "run": {"name": name, "output": str(output)},
        "data": {"global_batch": 16},
        "optim": {"lr": 0.02},
        "training": {"steps": 12, "log_every": 1, "save_every": 4, "keep": 2},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return parse_recipe(tree)


def validate(task: TinyTask, step: int) -> dict[str, float]:
    """Loss on a batch that training never sees; dropout of a forgetful task would disturb the run's random states."""
    torch.rand(3)
    batch = global_batch(10_000, 64)
    logits = task.predict(batch).float()
    return {
        "val/loss": nn.functional.cross_entropy(logits, batch.y).item(),
        "val/accuracy": (logits.argmax(1) == batch.y).float().mean().item(),
    }


def run_fit(
    recipe: Recipe,
    *,
    dropout: float = 0.0,
    on_step=None,
    poison: Collection[int] = (),
    validated: bool = True,
    heard=None,
    stretch: Stretch | None = None,
) -> FitResult:
    world = current_world()
    task = TinyTask(seed=world.rank, dropout=dropout)  # ranks start apart: rank 0's weights must win
    loader = TinyLoader(recipe, world, on_step, poison)
    run_dir = Path(recipe.run.output) / recipe.run.name

    def validate_aloud(task: TinyTask, step: int) -> dict[str, float]:
        metrics = validate(task, step)
        if heard is not None and step < recipe.training.steps:
            heard(step, metrics)
        return metrics

    return fit(
        task,
        loader,
        recipe,
        run_dir,
        world,
        validate=validate_aloud if validated else None,
        selection=Selection("val/accuracy", "higher"),
        save_model=lambda task, folder: (folder.mkdir(exist_ok=True), torch.save(task.state_dict(), folder / "w.pt")),
        stretch=stretch,
    )


def losses(output: Path, name: str) -> list[float]:
    return [line["train/loss"] for line in read_metrics(output / name) if "train/loss" in line]


def run(recipe: Recipe) -> dict[str, Any]:
    """Entry of the cluster tests. `finetune.task` tells what the last rank does besides training: `outage@6+die@10`."""
    faults = {
        int(at): fault for fault, _, at in (part.partition("@") for part in recipe.finetune.task.split("+")) if at
    }
    world = current_world()
    run_dir = Path(recipe.run.output) / recipe.run.name

    def on_step(step: int) -> None:
        fault = faults.get(step)
        fuse = run_dir / f"{fault}-fuse"
        if fault is None or world.rank != world.ranks - 1 or fuse.exists():
            return
        fuse.touch()
        if fault == "outage":
            raise Unreachable("storage failed", where="s3://clips", cure="check that it is reachable")
        if fault == "interrupt":
            os.kill(int((run_dir / "driver").read_text()), signal.SIGINT)
            time.sleep(2)  # by then rank 0 has looked
            return
        if fault == "hang":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)

    if recipe.finetune.task == "complain":
        raise UserError("no such index", where="shards/", cure="run `crossgate pack`")
    result = run_fit(recipe, on_step=on_step)
    results = {"step": result.step, "resumed_from": result.resumed_from, "ranks": world.ranks, **result.metrics}
    if world.leads:
        (run_dir / "results.json").write_text(json.dumps(results))
    return results


def run_trial(recipe: Recipe, heard, parent: str) -> dict[str, Any]:
    """A trial of the search tests: the learning rate decides, and 0.5 stands for a setting that fails."""
    marker = Path(recipe.run.output) / f"{recipe.run.name}.started"
    marker.write_text(marker.read_text() + "x" if marker.exists() else "x")
    if recipe.optim.lr == 0.5:
        raise RuntimeError("this trial fails\nsecond line")
    result = run_fit(recipe)
    heard(result.step - 1, result.metrics)
    return {"step": result.best_step}


def run_heard_trial(recipe: Recipe, heard, parent: str) -> dict[str, Any]:
    """A trial that is heard at each validation before the last; the first to be stopped takes its time to end."""
    marker = Path(recipe.run.output) / f"{recipe.run.name}.started"
    marker.write_text(marker.read_text() + "x" if marker.exists() else "x")
    try:
        return {"step": run_fit(recipe, heard=heard).best_step}
    except BaseException:
        stopped = Path(recipe.run.output) / "stopped"
        if not stopped.exists():
            stopped.touch()
            time.sleep(3)
        raise


def run_slow_trial(recipe: Recipe, heard, parent: str) -> dict[str, Any]:
    """A trial that takes seconds, so that who looks once a second sees it under way."""
    return {"step": run_fit(recipe, on_step=lambda step: time.sleep(0.3)).best_step}


def run_member(recipe: Recipe, heard=None, parent: str = "", until: int = 0) -> dict[str, Any]:
    """A trial of a population, or its replay: settings change on the way, and it may pause; 0.5 fails."""
    for stretch in stretches(recipe, until):
        if stretch.settings.optim.lr == 0.5:
            raise RuntimeError("this rate fails")
        result = run_fit(stretch.settings, stretch=stretch, dropout=0.2)
    return {"step": result.step if until else result.best_step}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case in cases:
        kill_at, term_at, crash_at = (case.get(f"{end}_at") for end in ("kill", "term", "crash"))

        def on_step(step: int, kill_at=kill_at, term_at=term_at, crash_at=crash_at) -> None:
            if step == crash_at:
                raise Crash
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == term_at and os.environ.get("RANK", "0") == "0":
                os.kill(os.getpid(), signal.SIGTERM)

        recipe = tiny_recipe(Path(case["output"]), case["name"], **case.get("sections", {}))
        with suppress(Crash):
            run_fit(
                recipe,
                dropout=case.get("dropout", 0.0),
                on_step=on_step,
                poison=case.get("poison", ()),
                validated=case.get("validated", True),
            )
    leave_world()
    print("needless:", sorted({"mlflow", "torch._inductor.compile_fx"} & sys.modules.keys()))


if __name__ == "__main__":
    main()
