"""What each self-supervised task teaches encoders, alone and mixed: probes of their features after the same steps.

    python benchmarks/pretext.py [--index shards | --clips 240] [--steps 64] [--batch 48] [--size 32] [--task action]
                                 [--seeds 3] [--head-steps 150] [--out FILE]

Small encoders are trained on all clips of the splits train and unlabelled, without labels and without augmentation,
once for each way: contrast only, each pretext task only, all of them in equal parts, under a random gate and under the
gate that learns, and that beside the contrast. Then a linear head for each modality, and one on the mean of all
features, learn from the labelled training clips with the encoders frozen, and are kept where validation is best. One
seed of pretraining, several of heads; intervals by groups of test clips. Without `--index`, clips are generated. The
last line is one JSON object: accuracy of the head on all features after each way, in per cent.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossgate.batch import ClipBatch
from crossgate.config import OptimConfig, Recipe, StudyConfig
from crossgate.evaluation.intervals import Bootstrap
from crossgate.recipe import parse_recipe
from crossgate.stream.index import Index
from crossgate.stream.loader import sequential
from crossgate.tasks import build_task
from crossgate.tasks.gates import Clips, Setting, train_gate, train_heads
from crossgate.tasks.pretext import KINDS
from crossgate.tasks.task import Task

MIXED = {"tasks": list(KINDS), "weight": 1.0}
WAYS: dict[str, dict[str, Any] | None] = {
    "nothing (random weights)": None,
    "contrast": {},
    **{name: {"contrast": 0.0, "pretext": {"tasks": [name], "weight": 1.0}} for name in KINDS},
    "all tasks, equal weights": {"contrast": 0.0, "pretext": {**MIXED, "weighting": "uniform"}},
    "all tasks, random gate": {"contrast": 0.0, "pretext": {**MIXED, "weighting": "random"}},
    "all tasks, gate": {"contrast": 0.0, "pretext": MIXED},
    "contrast and all tasks, gate": {"pretext": {**MIXED, "weight": 0.5}},
}


def recipe(size: int, way: dict[str, Any]) -> Recipe:
    """Returns what is trained: the encoders of the demo."""
    names = ("rgb", "flow", "audio", "depth")
    encoders = {name: {"backbone": "test_efficientnet", "norm": "group"} for name in names}
    return parse_recipe(
        {
            "kind": "pretrain",
            "data": {"clip": {"frames": 4, "size": size, "mels": size}},
            "model": {"dim": 128, "embedding": 64, "encoders": encoders},
            "pretrain": {"temperature": 0.2, "exclude_group": False, **way},
        }
    )


def decoded(index: Index, splits: list[str], own: Recipe) -> ClipBatch:
    """Returns all clips of some splits, in memory."""
    return ClipBatch.concatenate(list(sequential(index, splits, own.data, batch_size=32)))


def train(task: Task, clips: ClipBatch, steps: int, batch: int) -> dict[str, float]:
    """Trains by AdamW with a cosine; returns the means of what was reported over the last quarter."""
    optimiser = torch.optim.AdamW(task.parameter_groups(OptimConfig(lr=1.5e-3, weight_decay=0.05)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draw, order, kept = torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.int64), []
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(clips), generator=draw)
        rows, order = order[:batch], order[batch:]
        optimiser.zero_grad(set_to_none=True)
        loss, report = task(clips.select(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step >= 3 * steps // 4:
            kept.append({name: float(value) for name, value in report.items() if name.startswith("pretext/")})
    return {name: float(np.nanmean([one[name] for one in kept])) for name in kept[0]}


def features(task: Task, parts: dict[str, ClipBatch], label: str) -> dict[str, Clips]:
    """Returns the standardised features of the labelled clips of each part."""
    network: Any = task.eval().model.network
    found = {}
    with torch.no_grad():
        for part, clips in parts.items():
            pieces = [clips.select(slice(i, i + 64)) for i in range(0, len(clips), 64)]
            raw = torch.cat([network.raw_features(one.streams, one.present) for one in pieces])
            network.standardise(raw, clips.present)  # by the first part, which is that of training
            seen = network.encode({name: raw[:, m] for m, name in enumerate(clips.modalities)}, clips.present)
            found[part] = Clips(seen, clips.present, clips.labels[label], clips.group)
    return found


def probed(parts: dict[str, Clips], names: tuple[str, ...], setting: Setting) -> dict[str, np.ndarray]:
    """Returns for each modality, and for all, which test clips are right: ``(N,)`` share of seeds; NaN where absent."""
    test = parts["test"]
    right: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "all")}
    for seed in range(setting.study.seeds):
        heads = train_heads(parts["train"], parts["val"], setting, seed)
        gate = train_gate("mean", names, parts["train"], parts["val"], setting, seed)
        with torch.no_grad():
            alone = heads(test.features).argmax(-1) == test.labels.unsqueeze(1)
            for m, name in enumerate(names):
                right[name].append(np.where(test.present[:, m].numpy(), alone[:, m].numpy(), np.nan))
            right["all"].append((gate(test)[0].argmax(-1) == test.labels).double().numpy())
    return {name: np.mean(one, axis=0) for name, one in right.items()}


def accuracy(right: np.ndarray, base: np.ndarray, bootstrap: Bootstrap) -> tuple[float, str, str]:
    """Returns per cent, the same with its interval, and the paired difference to `base`."""

    def mean(values: np.ndarray) -> Any:
        return lambda weights: weights @ values / weights.sum(1)

    own = bootstrap.interval(mean(100 * right))
    over = bootstrap.difference(mean(100 * right), mean(100 * base))
    shown = f"{own.value:.1f} ({own.low:.1f} to {own.high:.1f})"
    return own.value, shown, f"{over.value:+.1f} ({over.low:+.1f} to {over.high:+.1f})"


def generated(folder: Path, clips: int) -> Path:
    """Generates and packs a few clips."""
    for arguments in (["synth", folder, "--clips", clips], ["pack", folder / "manifest.csv", folder / "shards"]):
        subprocess.run([sys.executable, "-m", "crossgate", *map(str, arguments)], check=True, stdout=sys.stderr)
    return folder / "shards"


def measure(options: argparse.Namespace, index: Index) -> tuple[list[str], dict[str, float]]:
    """Trains and probes every way; returns lines of Markdown and the accuracies."""
    own = recipe(options.size, {})
    names, classes = own.data.clip.modalities, index.vocabularies[options.task]
    pool = decoded(index, [name for name in ("train", "unlabelled") if name in index.splits], own)
    parts = {part: decoded(index, [part], own) for part in ("train", "val", "test")}
    parts = {part: one.select(torch.nonzero(one.labels[options.task] >= 0).squeeze(1)) for part, one in parts.items()}
    optim = OptimConfig(lr=3e-3, weight_decay=1.0)
    study = StudyConfig(seeds=options.seeds, steps=options.head_steps, batch=128, eval_every=15)
    setting = Setting(study, optim, own.model.fusion, len(classes))
    bootstrap = Bootstrap(parts["test"].group.numpy(), 2000)
    lines = [
        f"{datetime.date.today()}, {platform.machine()} CPU, one thread, PyTorch {torch.__version__}, fp32. "
        f"{len(pool)} clips without labels, {options.steps} steps of {options.batch}, {options.size} pixels; "
        f"{options.task}: {len(parts['train'])} labelled clips, {len(parts['test'])} test clips of {bootstrap.groups} "
        f"groups, chance {100 / len(classes):.1f} %.",
        "",
        f"| learnt from | all | over random weights | {' | '.join(names)} |",
        f"| --- | ---: | ---: |{' ---: |' * len(names)}",
    ]
    values, asked, base = {}, {}, None
    for name, way in WAYS.items():
        task = build_task(recipe(options.size, way or {}), {})
        if way is not None:
            asked[name] = train(task, pool, options.steps, options.batch)
        right = probed(features(task, parts, options.task), names, setting)
        base = right["all"] if base is None else base
        values[name], shown, over = accuracy(right["all"], base, bootstrap)
        alone = " | ".join(f"{100 * np.nanmean(right[one]):.1f}" for one in names)
        lines.append(f"| {name} | {shown} | {over if way is not None else ''} | {alone} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return [*lines, "", *solved(asked)], values


def solved(asked: dict[str, dict[str, float]]) -> list[str]:
    """Returns how well each pretext task was solved at the end, alone and mixed, and what the gate gave it."""
    mixed = asked["all tasks, gate"]
    lines = ["| task | guessing, % | alone, % | mixed, gate, % | weight |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, kind in KINDS.items():
        alone, own = (100 * one[f"pretext/accuracy_{name}"] for one in (asked[name], mixed))
        weight = mixed[f"pretext/weight_{name}"]
        lines.append(f"| {name} | {100 / kind.classes:.1f} | {alone:.1f} | {own:.1f} | {weight:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", default="")
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--head-steps", type=int, default=150)
    parser.add_argument("--task", default="action")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pretext.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        index = Index.load(options.index or str(generated(Path(folder) / "clips", options.clips)))
        lines, values = measure(options, index)
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(json.dumps({name: round(value, 1) for name, value in values.items()}))


if __name__ == "__main__":
    main()
