"""One rank of the parity test: a task's loss, report and averaged gradients for its slice of a fixed global batch.

Run as ``python ranks_worker.py FOLDER``; `recipe` and `clips` serve the other tests too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.recipe import parse_recipe
from crossgate.tasks import Task, build_task

CLIPS = 8
VOCABULARIES = {"action": ["jump", "run", "sit"]}


def recipe(kind: str, **sections: Any) -> Recipe:
    """Returns a recipe with tiny encoders."""
    encoders = {name: {"backbone": "test_vit"} for name in ("rgb", "flow", "audio", "depth")}
    fusion = {"name": "softmax", "hidden": 8, **sections.pop("fusion", {})}
    exchange = sections.pop("exchange", {})
    tree: dict[str, Any] = {
        "kind": kind,
        "run": {"seed": 5},
        "data": {"clip": {"size": 32, "frames": 2, "mels": 32, "seconds": 0.5, **sections.pop("clip", {})}},
        "model": {"dim": 16, "embedding": 8, "encoders": encoders, "fusion": fusion, "exchange": exchange},
    }
    return parse_recipe(tree | sections)


def clips(config: Recipe, count: int = CLIPS) -> ClipBatch:
    """Returns a ragged batch: a corrupt clip, unlabelled clips, and no audio in the second half."""
    draw = torch.Generator().manual_seed(1)
    clip = config.data.clip
    streams = {name: torch.randn(count, *clip.shape(name), generator=draw) for name in clip.modalities}
    streams["rgb"] = torch.randint(0, 256, streams["rgb"].shape, dtype=torch.uint8, generator=draw)
    present = torch.rand(count, len(clip.modalities), generator=draw) > 0.2
    present[1] = False
    if "audio" in clip.modalities:
        present[count // 2 :, clip.modalities.index("audio")] = False
    return ClipBatch(
        modalities=clip.modalities,
        streams=streams,
        present=present,
        group=torch.arange(count) % 5,
        labels={"action": torch.arange(count) % 4 - 1},
        degraded=torch.full(present.shape, torch.nan),
        clip=torch.arange(100, 100 + count),
        keys=[str(i) for i in range(count)],
    )


def solve(kind: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """Returns loss, report and gradients (averaged over ranks as a trainer does) in fp64."""
    pretext = {"pretext": {"tasks": ["rotation", "arrow", "synchrony"]}}
    slowed = {"modulation": 0.5, "modulation_noise": 1.0}
    exchange = {"name": "mmtm"} if kind == "finetune" else {}
    config = recipe(kind, fusion={"modality_dropout": 0.3}, pretrain=pretext, finetune=slowed, exchange=exchange)
    task: Task = build_task(config, VOCABULARIES).double()
    batch = clips(config).select(slice(rank * CLIPS // ranks, (rank + 1) * CLIPS // ranks))
    batch.streams = {name: stream.double() for name, stream in batch.streams.items()}
    loss, report = task(batch)
    loss.backward()
    found = {"loss": loss.detach(), **report}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, f"rank {rank}: no gradient for {name}, a collective would wait for ever"
        if ranks > 1:
            dist.all_reduce(parameter.grad)
        found[f"gradient/{name}"] = parameter.grad / ranks
    return found


def solve_both(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """Both kinds of task in one process group."""
    return {kind: solve(kind, rank, ranks) for kind in ("pretrain", "finetune")}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gloo_ranks import start

    start(solve_both, Path(sys.argv[1]))
