"""One rank and two give the same losses on real shards, started as users start them (`torchrun -m crossgate`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_road import tiny_tree

from crossgate.recipe import load_recipe
from crossgate.runs.context import run_directory
from crossgate.training.metrics import read_metrics

TOLERANCE = 2e-5  # fp32 sums in another order, over 4 steps of AdamW


def start(path: Path, ranks: int) -> str:
    """Runs a recipe under torchrun and returns what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "crossgate", load_recipe(path).kind, "-c", str(path)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(road: Path, folder: Path, ranks: int) -> list[float]:
    """Pretrains 4 steps under torchrun and returns the loss of each."""
    path = folder / "ranks.yaml"
    tree = tiny_tree(road, folder / f"runs-{ranks}", "pretrain", cluster={"launcher": "auto"})
    path.write_text(yaml.safe_dump(tree))
    start(path, ranks)
    rows = read_metrics(run_directory(load_recipe(path)))
    return [row["train/loss/total"] for row in rows if "train/loss/total" in row]


@pytest.mark.slow
def test_two_ranks_repeat_the_curve_of_one(road: Path, tmp_path: Path) -> None:
    one, two = losses(road, tmp_path, 1), losses(road, tmp_path, 2)
    assert len(one) == 4
    assert two == pytest.approx(one, abs=TOLERANCE)


@pytest.mark.slow
def test_a_rank_without_clips_of_its_own_takes_part_in_validation_under_zero_3(road: Path, tmp_path: Path) -> None:
    sections = {"engine": {"zero_stage": 3}, "evaluation": {"clips": 1}, "finetune": {"task": "action"}}
    path = tmp_path / "stage3.yaml"
    tree = tiny_tree(road, tmp_path, "finetune", cluster={"launcher": "auto"}, **sections)
    path.write_text(yaml.safe_dump(tree))
    assert start(path, ranks=2).count("next: ") == 2, "the last lines are said once"
    rows = read_metrics(run_directory(load_recipe(path)))
    assert [row["step"] for row in rows if "val/accuracy" in row] == [2, 4]
