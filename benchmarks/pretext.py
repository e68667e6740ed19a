"""What each self-supervised task teaches encoders, alone and mixed: probes of their features after the same steps.

    python benchmarks/pretext.py [--index shards | --clips 240] [--steps 64] [--batch 48] [--size 32] [--task action]
                                 [--seeds 5] [--ways all|alone|mixed] [--head-steps 150] [--out FILE]

Small encoders are trained on all clips of the splits train and unlabelled, without labels and without augmentation,
once for each way: contrast only, each pretext task only, all of them in equal parts, under a random gate and under the
gate that learns, and that beside the contrast (`--ways`: each task alone, or all but those). Then a linear head for
each modality, and one on the mean of all features, learn from the labelled training clips with the encoders frozen, and
are kept where validation is best. All that is drawn is drawn anew for each seed: encoders, order of clips, questions,
heads; of one seed all ways start from the same encoders and see the same clips. Differences are paired, with two
intervals: by groups of test clips, for these trainings (bootstrap), and by seeds, for these test clips (Student's t).
Without `--index`, clips are generated. The last line is one JSON object: accuracy of the head on all features after
each way, a mean over seeds in per cent, and points of the learnt gate over equal weights and over the random gate, each
with its interval by seeds.
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
from numpy.typing import NDArray

from crossgate.batch import ClipBatch
from crossgate.config import OptimConfig, Recipe, StudyConfig
from crossgate.evaluation.intervals import Bootstrap, mean, over_runs
from crossgate.recipe import parse_recipe
from crossgate.stream.index import Index
from crossgate.stream.loader import sequential
from crossgate.tasks import build_task
from crossgate.tasks.gates import Clips, Setting, train_gate, train_heads
from crossgate.tasks.pretext import KINDS
from crossgate.tasks.task import Task

Array = NDArray[Any]
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
NOTHING = next(iter(WAYS))
PAIRS = (
    ("all tasks, gate", "all tasks, equal weights"),
    ("all tasks, gate", "all tasks, random gate"),
    ("all tasks, gate", NOTHING),
    ("contrast and all tasks, gate", "contrast"),
    ("contrast", NOTHING),
)


def recipe(size: int, way: dict[str, Any], seed: int = 0) -> Recipe:
    """Returns what is trained: the encoders of the demo."""
    names = ("rgb", "flow", "audio", "depth")
    encoders = {name: {"backbone": "test_efficientnet", "norm": "group"} for name in names}
    return parse_recipe(
        {
            "kind": "pretrain",
            "run": {"seed": seed},
            "data": {"clip": {"frames": 4, "size": size, "mels": size}},
            "model": {"dim": 128, "embedding": 64, "encoders": encoders},
            "pretrain": {"temperature": 0.2, "exclude_group": False, **way},
        }
    )


def decoded(index: Index, splits: list[str], own: Recipe) -> ClipBatch:
    """Returns all clips of some splits, in memory."""
    return ClipBatch.concatenate(list(sequential(index, splits, own.data, batch_size=32)))


def train(task: Task, clips: ClipBatch, steps: int, batch: int, seed: int) -> dict[str, float]:
    """Trains by AdamW with a cosine; returns the means of what was reported over the last quarter."""
    optimiser = torch.optim.AdamW(task.parameter_groups(OptimConfig(lr=1.5e-3, weight_decay=0.05)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draw, order, kept = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.int64), []
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


def probed(parts: dict[str, Clips], names: tuple[str, ...], setting: Setting, seed: int) -> dict[str, Array]:
    """Returns for each modality, and for all, which test clips are right: ``(N,)`` of 0 and 1; NaN where absent."""
    test = parts["test"]
    heads = train_heads(parts["train"], parts["val"], setting, seed)
    gate = train_gate("mean", names, parts["train"], parts["val"], setting, seed)
    with torch.no_grad():
        alone = heads(test.features).argmax(-1) == test.labels.unsqueeze(1)  # (N, M)
        right = {
            name: np.where(test.present[:, m].numpy(), alone[:, m].numpy(), np.nan) for m, name in enumerate(names)
        }
        return right | {"all": (gate(test)[0].argmax(-1) == test.labels).double().numpy()}


def one_way(
    options: argparse.Namespace, name: str, seed: int, pool: ClipBatch, parts: dict[str, ClipBatch], setting: Setting
) -> tuple[dict[str, Array], dict[str, float]]:
    """Trains and probes one way of one seed; returns what `probed` and `train` do."""
    own, way = recipe(options.size, WAYS[name] or {}, seed), WAYS[name]
    torch.manual_seed(seed)
    task = build_task(own, {})
    asked = {} if way is None else train(task, pool, options.steps, options.batch, seed)
    return probed(features(task, parts, options.task), own.data.clip.modalities, setting, seed), asked


def difference(first: Array, second: Array, bootstrap: Bootstrap) -> tuple[str, str, list[float]]:
    """Returns the points of ``first`` over ``second``, both ``(S, N)`` of 0 and 1 by seed and clip.

    Returns:
        With the interval by groups of clips; the interval by seeds alone; value and interval by seeds as numbers.
    """
    by_clip = bootstrap.difference(mean(100 * first.mean(0)), mean(100 * second.mean(0)))
    by_seed = over_runs(100 * (first - second).mean(1))
    return (
        f"{by_clip.value:+.1f} ({by_clip.low:+.1f} to {by_clip.high:+.1f})",
        f"{by_seed.low:+.1f} to {by_seed.high:+.1f}",
        [round(one, 1) for one in (by_seed.value, by_seed.low, by_seed.high)],
    )


def generated(folder: Path, clips: int) -> Path:
    """Generates and packs a few clips."""
    for arguments in (["synth", folder, "--clips", clips], ["pack", folder / "manifest.csv", folder / "shards"]):
        subprocess.run([sys.executable, "-m", "crossgate", *map(str, arguments)], check=True, stdout=sys.stderr)
    return folder / "shards"


def measure(options: argparse.Namespace, index: Index) -> tuple[list[str], dict[str, Any]]:
    """Trains and probes every way; returns lines of Markdown and the numbers of the last line."""
    own = recipe(options.size, {})
    names, classes = own.data.clip.modalities, index.vocabularies[options.task]
    pool = decoded(index, [name for name in ("train", "unlabelled") if name in index.splits], own)
    parts = {part: decoded(index, [part], own) for part in ("train", "val", "test")}
    parts = {part: one.select(torch.nonzero(one.labels[options.task] >= 0).squeeze(1)) for part, one in parts.items()}
    study = StudyConfig(seeds=options.seeds, steps=options.head_steps, batch=128, eval_every=15)
    setting = Setting(study, OptimConfig(lr=3e-3, weight_decay=1.0), own.model.fusion, len(classes))
    bootstrap = Bootstrap(parts["test"].group.numpy(), 2000)
    lines = [
        f"{datetime.date.today()}, {platform.machine()} CPU, one thread, PyTorch {torch.__version__}, fp32. "
        f"{len(pool)} clips without labels, {options.steps} steps of {options.batch}, {options.size} pixels; "
        f"{options.task}: {len(parts['train'])} labelled clips, {len(parts['test'])} test clips of {bootstrap.groups} "
        f"groups, chance {100 / len(classes):.1f} %. {options.seeds} seeds of pretraining and heads.",
        "",
    ]
    wanted = {"all": set(WAYS), "alone": {NOTHING, *KINDS}, "mixed": set(WAYS) - set(KINDS)}[options.ways]
    ways = [name for name in WAYS if name in wanted]
    right: dict[str, list[dict[str, Array]]] = {name: [] for name in ways}
    asked: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name in ways:
            found, report = one_way(options, name, seed, pool, parts, setting)
            right[name].append(found)
            asked[name].append(report)
            print(f"seed {seed}: {name}: {100 * found['all'].mean():.1f}", file=sys.stderr, flush=True)
    whole = {name: np.stack([one["all"] for one in found]) for name, found in right.items()}  # (S, N) each
    judged = [pair for pair in PAIRS if wanted.issuperset(pair)]
    tables = [accuracies(right, whole, bootstrap, names), *pairs(whole, bootstrap, judged), solved(asked)]
    values: dict[str, Any] = {name: round(100 * float(one.mean()), 1) for name, one in whole.items()}
    for first, second in judged[:2]:
        points = difference(whole[first], whole[second], bootstrap)[2]
        values[f"{first} over {second}"] = [one for one in points if np.isfinite(one)]  # one seed: no interval
    return [*lines, *"\n\n".join("\n".join(table) for table in tables).split("\n")], values


def accuracies(
    right: dict[str, list[dict[str, Array]]], whole: dict[str, Array], bootstrap: Bootstrap, names: tuple[str, ...]
) -> list[str]:
    """Returns the table of accuracies: mean over seeds with interval by groups, spread over seeds, each modality."""
    lines = [
        f"| learnt from | all | SD | over random weights | by seeds | {' | '.join(names)} |",
        f"| --- | ---: | ---: | ---: | ---: |{' ---: |' * len(names)}",
    ]
    for name, one in whole.items():
        own, spread = bootstrap.interval(mean(100 * one.mean(0))), 100 * one.mean(1)
        deviation = f"{spread.std(ddof=1):.1f}" if len(spread) > 1 else ""
        by_clip, by_seed = ("", "") if name == NOTHING else difference(one, whole[NOTHING], bootstrap)[:2]
        alone = " | ".join(f"{np.mean([100 * np.nanmean(seed[m]) for seed in right[name]]):.1f}" for m in names)
        shown = f"{own.value:.1f} ({own.low:.1f} to {own.high:.1f})"
        lines.append(f"| {name} | {shown} | {deviation} | {by_clip} | {by_seed} | {alone} |")
    return lines


def pairs(whole: dict[str, Array], bootstrap: Bootstrap, judged: list[tuple[str, str]]) -> list[list[str]]:
    """Returns the table of what is to be judged, paired, by groups and by seeds; none where nothing is."""
    if not judged:
        return []
    lines = ["| paired | points, by groups | by seeds | seeds ahead |", "| --- | ---: | ---: | ---: |"]
    for first, second in judged:
        by_clip, by_seed, _ = difference(whole[first], whole[second], bootstrap)
        ahead = int((whole[first].mean(1) > whole[second].mean(1)).sum())
        lines.append(f"| {first} - {second} | {by_clip} | {by_seed} | {ahead} of {len(whole[first])} |")
    return [lines]


def solved(asked: dict[str, list[dict[str, float]]]) -> list[str]:
    """Returns how well each pretext task was solved at the end, alone and mixed, and what the gate gave it."""

    def shown(way: str, key: str) -> str:
        return f"{100 * np.mean([one[key] for one in asked[way]]):.1f}" if way in asked else ""

    lines = ["| task | guessing, % | alone, % | mixed, gate, % | weight |", "| --- | ---: | ---: | ---: | ---: |"]
    mixed = "all tasks, gate"
    for name, kind in KINDS.items():
        weights = [one[f"pretext/weight_{name}"] for one in asked.get(mixed, [])]
        alone, own = (shown(way, f"pretext/accuracy_{name}") for way in (name, mixed))
        span = f"{np.mean(weights):.3f} ({min(weights):.3f} to {max(weights):.3f})" if weights else ""
        lines.append(f"| {name} | {100 / kind.classes:.1f} | {alone} | {own} | {span} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", default="")
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", choices=("all", "alone", "mixed"), default="all", help="each task alone, or not")
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
    print(json.dumps(values))


if __name__ == "__main__":
    main()
