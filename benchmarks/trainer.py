"""What the trainer costs over a bare PyTorch loop: steps, start, and saving while a checkpoint is uploaded.

    python benchmarks/trainer.py [--steps 40] [--rounds 3] [--width 512] [--batch 32] [--out FILE]

One model, one batch in memory, one process a rank with one thread. In each round the bare loop and each layer train
in turn in the same processes, `--steps` steps apiece, so that the machine's other work meets all alike: the loop with
torch's AdamW and clipping (for two ranks under DDP), the same with torch's fused AdamW, DeepSpeed's engine as `Driver`
steps it, and `fit` as every run goes through it, with logging and metrics. Ratios are medians over rounds. Ray Train
adds processes around these ranks, nothing to a step. The last line is one JSON object: `clips_ratio_1`, `clips_ratio_2`
(of `fit` to the bare loop, one and two ranks), the same with `_fused` (to the loop with that), `upload_bump_pct` (step
time while a checkpoint is uploaded over step time otherwise), `start_s`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossgate.config import OptimConfig, Recipe
from crossgate.recipe import parse_recipe
from crossgate.stream.storage import Store
from crossgate.training import loop
from crossgate.training.driver import Driver
from crossgate.training.engine import build_engine
from crossgate.training.upload import Uploader
from crossgate.training.world import World, current_world, leave_world

LAYERS = ("bare", "bare, fused AdamW", "engine", "fit")


@dataclass
class Batch:
    x: Tensor
    keys: list[str]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.x.to(device), self.keys)

    def pin_memory(self) -> Batch:
        return Batch(self.x.pin_memory(), self.keys)


class Task(nn.Module):
    """A transformer on one stream of vectors: enough work a step that a step's own cost is seen, not hidden."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.head(self.body(batch.x)).square().mean()
        return loss, {"loss/total": loss.detach()}

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": optim.lr, "weight_decay": optim.weight_decay}]


class Loader:
    """One batch for ever."""

    steps_per_epoch = 1 << 30

    def __init__(self, batch: Batch) -> None:
        self.batch, self.times = batch, [0.0]

    def __iter__(self) -> Any:
        self.times.clear()
        while True:
            self.times.append(time.perf_counter())
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def settle(self, gather: Any) -> None:
        pass

    def meters(self) -> dict[str, float]:
        return {}


def recipe(folder: str, name: str, steps: int, batch: int, **training: Any) -> Recipe:
    return parse_recipe(
        {
            "kind": "finetune",
            "run": {"name": name, "output": folder},
            "data": {"global_batch": batch},
            "training": {"steps": steps, "log_every": 10, "save_every": steps, "keep": 1, **training},
        }
    )


def share(options: argparse.Namespace, world: World) -> Batch:
    torch.manual_seed(1)
    size = options.batch // world.ranks
    return Batch(torch.randn(size, 16, options.width), [str(row) for row in range(size)])


# ---- the layers: each returns seconds a step -------------------------------------------------------------------


def bare(options: argparse.Namespace, world: World, folder: str, *, fused: bool = False) -> float:
    task: nn.Module = Task(options.width)
    config = OptimConfig()
    optimizer = torch.optim.AdamW(task.parameter_groups(config), lr=config.lr, betas=config.betas, fused=fused)  # type: ignore[operator]
    model = nn.parallel.DistributedDataParallel(task) if world.ranks > 1 else task
    batch = share(options, world)

    def step() -> None:
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), config.clip_norm)
        optimizer.step()

    return timed(step, options.steps)


def engine(options: argparse.Namespace, world: World, folder: str) -> float:
    config = recipe(folder, "engine", options.steps, options.batch)
    made = build_engine(Task(options.width), config, world)
    driver = Driver(made, config, world, lambda part: None)
    batch = share(options, world)

    def step() -> None:
        loss, _ = driver(batch)
        driver.backward(loss)
        driver.step()

    made.train()
    seconds = timed(step, options.steps)
    made.destroy()
    return seconds


def fit(options: argparse.Namespace, world: World, folder: str) -> float:
    loader = Loader(share(options, world))
    name = f"fit-{time.time_ns()}" if world.ranks == 1 else world.from_leader(f"fit-{time.time_ns()}")
    config = recipe(folder, name, options.steps + 2, options.batch)
    loop.fit(Task(options.width), loader, config, Path(folder) / name, world)
    return (loader.times[-1] - loader.times[2]) / (len(loader.times) - 3)


def timed(step: Callable[[], None], steps: int) -> float:
    for _ in range(2):
        step()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begun) / steps


# ---- ranks -----------------------------------------------------------------------------------------------------


def rank(number: int, ranks: int, port: int, options: argparse.Namespace, folder: str, answer: Any) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    world = current_world()
    seconds: dict[str, list[float]] = {layer: [] for layer in LAYERS}
    for turn in range(options.rounds + 1):  # the first one warms up
        for layer in LAYERS if turn % 2 else reversed(LAYERS):
            taken = (bare, partial(bare, fused=True), engine, fit)[LAYERS.index(layer)](options, world, folder)
            if turn:
                seconds[layer].append(taken)
    if world.leads:
        answer.put(seconds)
    leave_world()


def measured(ranks: int, options: argparse.Namespace, folder: str) -> dict[str, list[float]]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=rank, args=(number, ranks, port, options, folder, answer)) for number in range(ranks)
    ]
    for process in processes:
        process.start()
    seconds = answer.get(timeout=1800)
    for process in processes:
        process.join()
    return seconds


# ---- uploading and starting ------------------------------------------------------------------------------------


class Slow(Store):
    """A store at the end of a line of 20 MB/s, which costs time and no arithmetic, as a network's does."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.begun = threading.Event()

    def put(self, name: str, content: bytes | Path) -> None:
        self.begun.set()
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        super().put(name, content)
        time.sleep(size / 20e6)


def upload_bump(options: argparse.Namespace, folder: str) -> float:
    """Returns by how many percent a step is longer while a checkpoint is on its way; steps of both kinds alternate."""
    torch.set_num_threads(1)
    world = current_world()
    config = recipe(folder, "uploaded", 3, options.batch)
    loop.fit(Task(options.width), Loader(share(options, world)), config, Path(folder) / "uploaded", world)
    path = Path(folder) / "uploaded" / "checkpoints" / "step-00000003"
    made = build_engine(Task(options.width), config, world)
    driver = Driver(made, config, world, lambda part: None)
    batch = share(options, world)
    store = Slow(f"{folder}/store")
    uploader = Uploader(store, lambda said: None)

    def step() -> float:
        begun = time.perf_counter()
        loss, _ = driver(batch)
        driver.backward(loss)
        driver.step()
        return time.perf_counter() - begun

    for _ in range(3):
        step()
    calm: list[float] = []
    busy: list[float] = []
    for _ in range(3 * options.rounds):
        calm += [step() for _ in range(5)]
        store.begun.clear()
        uploader.put(path, [path.name])
        store.begun.wait()
        busy.append(step())
        while uploader.travelling:
            busy.append(step())
    uploader.finish()
    return 100 * (statistics.median(busy) / statistics.median(calm) - 1)


def start_parts() -> dict[str, float]:
    """Returns seconds of a process's way to its first step, by part."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import time; t = [time.perf_counter()]
import torch; t.append(time.perf_counter())
import crossgate.training.loop; t.append(time.perf_counter())
import trainer as b, tempfile, os
from crossgate.training.world import current_world
world = current_world(); folder = tempfile.mkdtemp(); sys.stderr = open(os.devnull, "w")
t.append(time.perf_counter())
e = b.build_engine(b.Task(64), b.recipe(folder, "x", 1, 8), world); t.append(time.perf_counter())
batch = b.Batch(torch.randn(8, 4, 64), []); e.train(); e.backward(e(batch)[0]); e.step(); t.append(time.perf_counter())
print("start", *[round(b - a, 3) for a, b in zip(t, t[1:])])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("start"))
    names = ("import torch", "import crossgate", "join the world", "DeepSpeed: import and engine", "first step")
    return dict(zip(names, map(float, line.split()[1:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "trainer.md"))
    options = parser.parse_args()
    lines = [
        f"{datetime.date.today()}, {platform.machine()} CPU, {os.cpu_count()} cores shared with other work, one thread "
        f"a rank, PyTorch {torch.__version__}, fp32, "
        f"ZeRO as unset (0 alone, else 1), width {options.width}, {options.batch} clips a step, "
        f"medians of {options.rounds} rounds of {options.steps} steps",
        "",
        "| ranks | layer | ms a step | clips/s, of the bare loop's |",
        "| ---: | --- | ---: | ---: |",
    ]
    summary: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            found = measured(ranks, options, folder)
            for layer in LAYERS:
                ratio = statistics.median(b / s for b, s in zip(found["bare"], found[layer]))
                lines.append(f"| {ranks} | {layer} | {1000 * statistics.median(found[layer]):.1f} | {ratio:.3f} |")
            for name, against in (("", "bare"), ("_fused", "bare, fused AdamW")):
                ratio = statistics.median(b / s for b, s in zip(found[against], found["fit"]))
                summary[f"clips_ratio_{ranks}{name}"] = round(ratio, 3)
        summary["upload_bump_pct"] = round(upload_bump(options, folder), 1)
    parts = start_parts()
    summary["start_s"] = round(sum(parts.values()), 2)
    lines += ["", f"A step while a checkpoint is uploaded at 20 MB/s: {summary['upload_bump_pct']:+.1f} %.", ""]
    lines += ["| way to the first step | s |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in parts.items()]
    table = "\n".join(lines) + "\n"
    Path(options.out).write_text(table)
    print(table)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
