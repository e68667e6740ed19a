"""What a GPU makes of the encoders: clips/s, MFU and memory, compiled and not, against a bare loop; and the contrast.

    python benchmarks/gpu.py [--models vit_small_patch16_224 ...] [--steps 30] [--rounds 3] [--out FILE]

Needs one GPU, and neither Ray nor a network. Where there is no GPU it says so and measures nothing.

Contrastive pretraining in bf16 on random clips of four modalities in host memory, one encoder each, for ViT-S, B and L;
the largest micro-batch that `crossgate estimate` lets fit. In each round these train in turn, `--steps` steps apiece
after a warm-up, each in a process of its own, so that its memory is its own:

- bare: the task under autocast, torch's fused AdamW and clipping, clips on the device already;
- crossgate: `fit`, as every run goes through it (DeepSpeed, ZeRO 1), clips copied from host memory;

both without and with the encoders compiled. MFU is 3 x the forward pass's counted FLOPs over the device's dense bf16
peak, and left out where that is not known. Memory is the allocator's peak, beside what `estimate` says of the states
and activations. The contrast is that of `contrastive_memory.py`, tiled against full matrices. The last line is one JSON
object: `gpu` (its name, or null), and of each model, compiled, `clips_ratio`, `mfu_pct`, `data_wait_pct` and
`estimate_ratio`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import crossgate  # noqa: F401  (before timm)
from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.recipe import parse_recipe
from crossgate.runs.estimate import estimate, random_clips
from crossgate.tasks import build_task
from crossgate.training.loop import fit
from crossgate.training.meters import GIB, peak_flops
from crossgate.training.metrics import read_metrics
from crossgate.training.world import current_world

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
CONTRASTS = (4096, 16384, 32768)
WARM_UP = 5  # steps: allocators settle, kernels are chosen
LARGEST = 256


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    compiled: bool
    batch: int
    steps: int
    precision: str = "bf16"
    size: int = 224
    frames: int = 4
    dim: int = 512

    def recipe(self, folder: str) -> Recipe:
        names = ("rgb", "flow", "audio", "depth")
        clip = {"size": self.size, "frames": self.frames, "mels": self.size // 2, "seconds": 1.0}
        return parse_recipe(
            {
                "kind": "pretrain",
                "run": {"name": f"{self.model}-{time.time_ns()}", "output": folder},
                "data": {"global_batch": self.batch, "clip": clip},
                "model": {"dim": self.dim, "encoders": {name: {"backbone": self.model} for name in names}},
                "engine": {"zero_stage": 1, "precision": self.precision, "compile": self.compiled},
                # Meters begin anew at each log line: one ends the warm-up, the next one is the measurement.
                "training": {"steps": 1 << 20, "log_every": self.steps, "save_every": 1 << 20, "watchdog_s": 0},
            }
        )


@dataclass(frozen=True)
class Found:
    """What was measured."""

    clips_per_s: float
    mfu_pct: float | None = None
    peak_gib: float | None = None
    data_wait_pct: float | None = None


# ---- the two loops ---------------------------------------------------------------------------------------------


def bare(case: Case, device: torch.device) -> Found:
    """The loop that anyone would write: autocast, AdamW, clipping; nothing is read, logged or kept."""
    recipe = case.recipe("unused")
    task = build_task(recipe, {}).to(device)
    batch = random_clips(recipe, case.batch).to(device)
    flops = counted_flops(task, batch, case, device)
    if case.compiled:
        task.compile_encoders()
    optimizer = torch.optim.AdamW(task.parameter_groups(recipe.optim), fused=True)
    half = torch.bfloat16 if case.precision == "bf16" else torch.float32

    def step() -> None:
        with torch.autocast(device.type, half, enabled=case.precision == "bf16"):
            loss, _ = task(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), recipe.optim.clip_norm)
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    settled(device)
    begun = time.perf_counter()
    for _ in range(case.steps):
        step()
    settled(device)
    seconds = (time.perf_counter() - begun) / case.steps
    peak = peak_flops(device, case.precision)
    return Found(case.batch / seconds, 100 * flops / seconds / peak if peak else None, peak_gib(device))


def counted_flops(task: Any, batch: ClipBatch, case: Case, device: torch.device) -> float:
    """Returns FLOPs of a step: a backward pass costs twice its forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    half = torch.bfloat16 if case.precision == "bf16" else torch.float32
    with torch.no_grad(), torch.autocast(device.type, half, enabled=case.precision == "bf16"):
        with FlopCounterMode(display=False) as counter:
            task(batch)
    return 3.0 * counter.get_total_flops()


class Enough(Exception):
    """Ends `fit` before it would save what nobody wants."""


class Memory:
    """The same clips in host memory for ever, until `Enough`."""

    steps_per_epoch = 1 << 20

    def __init__(self, batch: ClipBatch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __iter__(self) -> Iterator[ClipBatch]:
        for _ in range(self.steps):
            yield self.batch
        raise Enough

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def settle(self, gather: Any) -> None: ...

    def meters(self) -> dict[str, float]:
        return {}


def trained(case: Case, device: torch.device) -> Found:
    """The same by `fit`, up to where it would save: what its last log line says."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = case.recipe(folder)
        run_dir = Path(folder) / recipe.run.name
        loader = Memory(random_clips(recipe, case.batch), 2 * case.steps)  # the first half warms up
        try:
            fit(build_task(recipe, {}), loader, recipe, run_dir, current_world())
        except Enough:
            line = read_metrics(run_dir)[-1]
    assert line["step"] == 2 * case.steps
    return Found(
        line["throughput/clips_per_s"],
        line.get("throughput/mfu_pct"),
        line.get("memory/gpu_peak_gib"),
        line["time/data_wait_pct"],
    )


LOOPS = {"bare": bare, "crossgate": trained}


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


# ---- the whole -------------------------------------------------------------------------------------------------


def estimated_gib(case: Case) -> float:
    """Returns the peak that `crossgate estimate` expects under ZeRO 1."""
    return next(need.peak for need in estimate(case.recipe("unused"), 1).needs if need.stage == 1) / GIB


def fitting_batch(model: str, memory_gib: float, **shape: Any) -> int:
    """Returns the largest micro-batch, a power of two, that the estimate lets fit with a tenth to spare.

    Raises:
        UserError: when not even two clips fit.
    """
    said = estimate(Case(model, False, 2, 1, **shape).recipe("unused"), 1)
    need = next(need for need in said.needs if need.stage == 1)
    batch = LARGEST
    while batch >= 2 and 1.1 * replace(need, activations=batch * said.per_clip).peak > memory_gib * GIB:
        batch //= 2
    if batch < 2:
        raise UserError(
            f"{model} on four modalities needs more than {memory_gib:.0f} GiB", cure="leave it out of --models"
        )
    return batch


def apart(loop: str, case: Case) -> Found:
    """Measures in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (loop, case))


def _measured(loop: str, case: Case) -> Found:
    return LOOPS[loop](case, torch.device("cuda", 0))


def compared(model: str, options: argparse.Namespace, memory_gib: float) -> tuple[list[str], dict[str, float | None]]:
    """Returns the table's rows of a model, and the figures of its compiled half."""
    batch = fitting_batch(model, memory_gib)
    rows, figures = [], {}
    for compiled in (False, True):
        case = Case(model, compiled, batch, options.steps)
        found: dict[str, list[Found]] = {loop: [] for loop in LOOPS}
        for turn in range(options.rounds):
            for loop in LOOPS if turn % 2 else reversed(LOOPS):
                found[loop].append(apart(loop, case))
        expected = estimated_gib(case)
        rows += [row(case, loop, middle(found[loop]), expected) for loop in LOOPS]
        ours = middle(found["crossgate"])
        figures = {
            "clips_ratio": statistics.median(
                b.clips_per_s / a.clips_per_s for a, b in zip(found["bare"], found["crossgate"])
            ),
            "mfu_pct": ours.mfu_pct,
            "data_wait_pct": ours.data_wait_pct,
            "estimate_ratio": expected / ours.peak_gib if ours.peak_gib else None,
        }
    return rows, {name: None if value is None else round(value, 3) for name, value in figures.items()}


def middle(found: list[Found]) -> Found:
    """Returns the medians of what rounds measured."""
    columns = {name: [getattr(one, name) for one in found] for name in asdict(found[0])}
    return Found(**{name: None if None in values else statistics.median(values) for name, values in columns.items()})


HEAD = [
    "| encoders | compiled | loop | clips a step | clips/s | MFU | peak GiB | estimate | data-wait |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def row(case: Case, loop: str, found: Found, expected: float) -> str:
    """Returns a line of the table."""

    def shown(value: float | None, form: str) -> str:
        return "not known" if value is None else format(value, form)

    cells = [
        case.model,
        "yes" if case.compiled else "no",
        loop,
        str(case.batch),
        f"{found.clips_per_s:.1f}",
        shown(found.mfu_pct, ".1f") + (" %" if found.mfu_pct is not None else ""),
        shown(found.peak_gib, ".1f"),
        f"{expected:.1f}" if loop == "crossgate" else "",
        f"{found.data_wait_pct:.1f} %" if found.data_wait_pct is not None else "",
    ]
    return f"| {' | '.join(cells)} |"


def contrasts(sizes: tuple[int, ...], dim: int, tile: int, device: str) -> list[str]:
    """Returns a table of the contrast over global batches of so many clips: milliseconds and MiB, tiled and full."""
    from contrastive_memory import MIB, competitors, inputs, memory, step

    lines = ["| clips | contrast | ms | MiB |", "| ---: | --- | ---: | ---: |"]
    for clips in sizes:
        for name in ("tiles", "full"):
            try:
                loss, given = competitors(tile)[name], inputs(clips, dim, device)
                times = []
                for _ in range(4):
                    begun = time.perf_counter()
                    step(loss, *given)
                    times.append(time.perf_counter() - begun)
                taken = memory(name, tile, clips, dim, device) / MIB
                lines.append(f"| {clips} | {name} | {1000 * min(times):.1f} | {taken:.0f} |")
            except torch.OutOfMemoryError:
                lines.append(f"| {clips} | {name} | out of memory | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu.md"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here (torch sees none): nothing was measured. Run this on a machine that has one.")
        print(json.dumps({"gpu": None}))
        return
    name, memory_gib = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / GIB
    lines = [
        f"{datetime.date.today()}, {name} ({memory_gib:.0f} GiB), PyTorch {torch.__version__}, bf16, ZeRO 1, four "
        f"modalities of 4 frames of 224 x 224, medians of {options.rounds} rounds of {options.steps} steps",
        "",
        *HEAD,
    ]
    summary: dict[str, Any] = {"gpu": name}
    for model in options.models:
        try:
            rows, summary[model] = compared(model, options, memory_gib)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        lines += rows
        print("\n".join(rows), flush=True)
    lines += ["", *contrasts(CONTRASTS, 512, 2048, "cuda")]
    table = "\n".join(lines) + "\n"
    Path(options.out).write_text(table)
    print(table)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
