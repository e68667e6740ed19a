"""Thirty steps on generated clips, of pretraining and of encoders that learn of one another: one curve each, whatever
computes it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import curve_run
import pytest
import torch
from curve_run import BATCH, CLASSES, STEPS, curve_recipe, curve_task, global_batch, run_case
from free_ports import free_port
from test_numbers import spawn
from tiny_run import losses
from torch import nn

from crossgate.batch import ClipBatch
from crossgate.config import DataConfig
from crossgate.stream.index import Index
from crossgate.stream.loader import sequential

pytestmark = pytest.mark.slow
# fp32 sums in another order, through 30 steps of AdamW: losses of about 4 apart by less than this.
CLOSE = {"rel": 0, "abs": 1e-3}

ALONE = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "accumulation 4": {"zero_stage": 1, "accumulation": 4},
    "optimizer offload": {"zero_stage": 2, "offload": "optimizer"},
    "parameter offload": {"zero_stage": 3, "offload": "parameters"},
    "activation checkpointing": {"zero_stage": 1, "activation_checkpointing": True},
}
TOGETHER = {
    2: {
        "two ranks, zero 1": {"zero_stage": 1},
        "two ranks, zero 3, accumulation 2, checkpointing": {
            "zero_stage": 3,
            "accumulation": 2,
            "activation_checkpointing": True,
        },
    },
    4: {"four ranks, zero 2": {"zero_stage": 2}, "four ranks, zero 0": {"zero_stage": 0}},
}
EXCHANGE = [{"zero_stage": 0}, {"zero_stage": 3, "activation_checkpointing": True}]


@pytest.fixture(scope="module")
def clips(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of all generated clips, as tensors."""
    recipe = curve_recipe(Path("unused"), "unused")
    index = Index.load(str(road / "shards"))
    data = DataConfig(clip=recipe.data.clip)
    everything = next(iter(sequential(index, tuple(index.splits), data, batch_size=64)))
    assert len(everything) >= BATCH and everything.labels["action"].max() < CLASSES
    path = tmp_path_factory.mktemp("curves") / "clips.pt"
    torch.save({field.name: getattr(everything, field.name) for field in fields(everything)}, path)
    return path


@pytest.fixture(scope="module")
def plain(clips: Path) -> list[float]:
    """The losses of pretraining."""
    return plain_curve(clips, exchange=False)


@pytest.fixture(scope="module")
def plain_exchange(clips: Path) -> list[float]:
    """The losses of fine-tuning with an exchange, on clips that lack modalities."""
    return plain_curve(clips, exchange=True)


def plain_curve(clips: Path, exchange: bool) -> list[float]:
    """The losses of the loop that anyone would write."""
    recipe = curve_recipe(Path("unused"), "plain", exchange=exchange)
    everything = ClipBatch(**torch.load(clips, weights_only=True))
    task, curve = curve_task(recipe), []
    optimizer = torch.optim.AdamW(task.parameter_groups(recipe.optim), betas=recipe.optim.betas)
    peaks, warmup = [group["lr"] for group in optimizer.param_groups], round(recipe.optim.warmup * STEPS)
    for step in range(1, STEPS + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
        factor = step / warmup if step <= warmup else 0.01 + 0.99 * cosine
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        loss, _ = task(global_batch(everything, step - 1, exchange))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), recipe.optim.clip_norm)
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[0] - 0.3  # it learns, so that agreeing means something
    return curve


@pytest.mark.parametrize("name", ALONE)
def test_one_rank(tmp_path: Path, clips: Path, plain: list[float], name: str) -> None:
    run_case({"output": str(tmp_path), "name": "run", "engine": ALONE[name], "clips": str(clips)})
    assert losses(tmp_path, "run") == pytest.approx(plain, **CLOSE)


@pytest.mark.parametrize("ranks", TOGETHER)
def test_several_ranks(tmp_path: Path, clips: Path, plain: list[float], ranks: int) -> None:
    cases = [
        {"output": str(tmp_path), "name": f"run-{number}", "engine": engine, "clips": str(clips)}
        for number, engine in enumerate(TOGETHER[ranks].values())
    ]
    for process in spawn(cases, tmp_path, ranks, script=curve_run.__file__, timeout=280):
        assert process.returncode == 0, process.stdout[-3000:]
    for case in cases:
        assert losses(tmp_path, case["name"]) == pytest.approx(plain, **CLOSE), case["engine"]


def test_torchrun(tmp_path: Path, clips: Path, plain: list[float]) -> None:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    assert two_ranks(tmp_path, clips, before=start) == pytest.approx(plain, **CLOSE)


@pytest.mark.ray
def test_ray_train(tmp_path: Path, clips: Path, plain: list[float]) -> None:
    """In a process of its own: Ray forks, and a fork of a process that has trained here may never come to life."""
    assert two_ranks(tmp_path, clips, after=["--ray"]) == pytest.approx(plain, **CLOSE)


def two_ranks(tmp_path: Path, clips: Path, before: Sequence[str] = (), after: Sequence[str] = ()) -> list[float]:
    """The losses of two ranks at ZeRO 2, started by what stands before and after the script and its file of cases."""
    case = {"output": str(tmp_path), "name": "run", "engine": {"zero_stage": 2}, "clips": str(clips)}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    command = [sys.executable, *before, curve_run.__file__, str(tmp_path / "cases.json"), *after]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(tmp_path, "run")


def test_encoders_that_learn_of_one_another(tmp_path: Path, clips: Path, plain_exchange: list[float]) -> None:
    """No rank waits for another that has no sound, no losses but those of plain PyTorch."""
    cases = [
        {"output": str(tmp_path), "name": f"run-{number}", "engine": engine, "clips": str(clips), "exchange": True}
        for number, engine in enumerate(EXCHANGE)
    ]
    for process in spawn(cases, tmp_path, 2, script=curve_run.__file__, timeout=280):
        assert process.returncode == 0, process.stdout[-3000:]
    for case in cases:
        assert losses(tmp_path, case["name"]) == pytest.approx(plain_exchange, **CLOSE), case["engine"]
