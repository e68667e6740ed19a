"""The search finds an adapting gate where one modality is noise for half of the clips, and claims none elsewhere.

The first one is killed half-way and started again: no trial is doubled or lost, on disk or in MLflow.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from planted_run import DIM, NAMES
from search_checks import check_nesting, check_values, ended

from crossgate.cluster.ray_tune import search
from crossgate.cluster.trials import known_trials
from crossgate.evaluation import read_results
from crossgate.recipe import parse_recipe

GATE = "model.fusion.name"
FIXED = ("mean", "concat", "fixed_logits", "average_logits")
ADAPTING = ("softmax", "sigmoid", "gmu", "softmax_logits")
SCRIPT = Path(__file__).with_name("search_process.py")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def tree(output: Path, kind: str, **keys: Any) -> dict[str, Any]:
    return {
        "kind": "search",
        "run": {"name": kind, "output": str(output)},
        "data": {"global_batch": 60, "clip": {"modalities": list(NAMES), "frames": 1, "size": 32, "mels": 32}},
        "model": {"dim": DIM, "encoders": {name: {"backbone": "test_convnext"} for name in NAMES}},
        "finetune": {"task": "action", "freeze": True, "features": str(output / kind), "unimodal_weight": 0.3},
        "optim": {"lr": 0.01},
        "training": {"steps": 200, "eval_every": 40, "log_every": 200, "save_every": 200},
        "cluster": {"address": "local"},
        "search": {"space": {GATE: ["mean", "softmax"]}, "concurrent": 2, "seeds": 2, "finalists": 1, **keys},
    }


def start(recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, SCRIPT, recipe], stdout=file, stderr=file)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the search and everything that it started, all at once."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        one.kill()
    psutil.wait_procs(family, timeout=20)


def test_a_killed_search_over_eight_gates_goes_on_and_names_one_that_adapts(tmp_path: Path, ray_cluster: Any) -> None:
    space = {GATE: [*FIXED, *ADAPTING], "optim.lr": {"low": 0.005, "high": 0.02, "log": True}}
    keys = {"space": space, "samples": 10, "searcher": "optuna", "scheduler": "asha", "reduction": 2.0}
    recipe, log, folder = tmp_path / "recipe.json", tmp_path / "log", tmp_path / "noisy"
    recipe.write_text(json.dumps(tree(tmp_path, "noisy", **keys)))
    first = start(recipe, log)
    while first.poll() is None and len(ended(folder)) < 4:
        time.sleep(0.1)
    assert first.poll() is None, log.read_text()[-2000:]
    kill(first)
    before = ended(folder)
    search(parse_recipe(json.loads(recipe.read_text())), "planted_run:run_trial")

    explored = known_trials(folder)
    assert len(explored) == 10 and {record.status for record in explored} == {"finished", "pruned"}
    assert {record.overrides[GATE] for record in explored} == {*FIXED, *ADAPTING}
    assert all(record in explored for record in before if record.overrides[GATE] != "mean")
    for record in before:
        if record.overrides[GATE] != "mean":  # which is run to its end if it was pruned
            assert (folder / f"{record.name}.started").read_text() == "x", record.name
    board = json.loads((folder / "leaderboard.json").read_text())
    assert len({row["name"] for row in board}) == len(board) in (10, 11)
    assert board[0]["overrides"][GATE] in ADAPTING
    numbers, _ = read_results(folder / "results.json")
    assert numbers["search/over_averaging/beats"] == 1.0 and numbers["search/over_averaging/difference_low"] > 0
    assert {path.stem for path in (folder / "figures").iterdir()} == {"parallel_coordinates", "importances"}
    check_values(explored, "val/accuracy")
    check_nesting(f"sqlite:///{tmp_path / 'mlflow.db'}", folder)


def test_where_nothing_is_degraded_no_winner_is_claimed(tmp_path: Path, ray_cluster: Any) -> None:
    settings = tree(tmp_path, "clean") | {"tracking": {"enabled": False}}
    result = search(parse_recipe(settings), "planted_run:run_trial")
    assert result.verdict.startswith("no gate beat averaging")
    assert [len(trial.by_seed) for trial in result.trials[:1]] == [2]
