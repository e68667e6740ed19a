"""Ctrl-C as a terminal sends it: to the trainer and all its loader workers at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_road import tiny_tree, write_recipe

from crossgate.runs.context import run_directory
from crossgate.training.checkpoint import newest_whole
from crossgate.training.metrics import read_metrics

FAR = 10_000  # steps


def interrupt_at_first_step(recipe: Path, run_dir: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "crossgate", "pretrain", "--config", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0) as run:
        try:
            while not (run_dir / "metrics.jsonl").exists() or not read_metrics(run_dir):
                assert run.poll() is None, run.communicate()[0]
                time.sleep(0.05)
            os.killpg(run.pid, signal.SIGINT)
            said, _ = run.communicate(timeout=200)
        finally:
            run.kill()
    return run.returncode, said


def test_ctrl_c_saves_and_says_so(road: Path, tmp_path: Path) -> None:
    training = {"steps": FAR, "save_every": FAR, "eval_every": FAR}
    tree = tiny_tree(road, tmp_path, "pretrain", training=training, data={"loader_workers": 1})
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    run_dir = run_directory(recipe)
    status, said = interrupt_at_first_step(tmp_path / "recipe.yaml", run_dir)
    assert status == 130, said
    newest, _ = newest_whole(run_dir)
    assert newest is not None and f"stopped at step {newest.step} as asked; saved" in said
    assert said.splitlines()[-1] == "crossgate: stopped" and "Traceback" not in said
    assert newest.step >= 1 and recipe.training.steps == FAR
