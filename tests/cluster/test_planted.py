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

import pytest
import torch
from families import kill_family
from planted_run import GATE, run_trial, tree
from safetensors.torch import load_file
from search_checks import check_nesting, check_values, ended

from crossgate.cluster.ray_tune import search
from crossgate.cluster.trials import known_trials
from crossgate.evaluation import read_results
from crossgate.recipe import load_recipe, parse_recipe
from crossgate.runs import context, finetune
from crossgate.runs.fusions import AVERAGES

FIXED = ("mean", "concat", "fixed_logits", "average_logits")
ADAPTING = ("softmax", "sigmoid", "gmu", "softmax_logits")
SCRIPT = Path(__file__).with_name("search_process.py")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def start(recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, SCRIPT, recipe], stdout=file, stderr=file)


def test_a_killed_search_over_eight_gates_goes_on_and_names_one_that_adapts(tmp_path: Path, ray_cluster: Any) -> None:
    space = {GATE: [*FIXED, *ADAPTING], "optim.lr": {"low": 0.005, "high": 0.02, "log": True}}
    keys = {"space": space, "samples": 10, "searcher": "optuna", "scheduler": "asha", "reduction": 2.0, "seeds": 4}
    recipe, log, folder = tmp_path / "recipe.json", tmp_path / "log", tmp_path / "noisy"
    recipe.write_text(json.dumps(tree(tmp_path, "noisy", **keys)))
    first = start(recipe, log)
    while first.poll() is None and len(ended(folder)) < 4:
        time.sleep(0.1)
    assert first.poll() is None, log.read_text()[-2000:]
    kill_family(first.pid)
    before = ended(folder)
    search(parse_recipe(json.loads(recipe.read_text())), "planted_run:run_trial")

    explored = known_trials(folder)
    drawn = [record for record in explored if not record.added]
    assert len(drawn) == 10 and {record.status for record in explored} == {"finished", "pruned"}
    assert {record.overrides[GATE] for record in drawn} == {*FIXED, *ADAPTING}
    assert {record.overrides[GATE] for record in explored if record.added} <= set(AVERAGES)
    kept = [record for record in before if record.overrides[GATE] not in AVERAGES]  # a pruned one is run to its end
    assert all(record in explored for record in kept)
    for record in kept:
        assert (folder / f"{record.name}.started").read_text() == "x", record.name
    board = json.loads((folder / "leaderboard.json").read_text())
    assert sorted(row["name"] for row in board) == sorted(record.name for record in explored)
    assert board[0]["overrides"][GATE] in ADAPTING and len(board[0]["by_seed"]) == 3
    numbers, _ = read_results(folder / "results.json")
    assert numbers["search/over_averaging/beats"] == 1.0 and numbers["search/over_averaging/difference_low"] > 0
    assert {path.stem for path in (folder / "figures").iterdir()} == {"parallel_coordinates", "importances"}
    check_values(explored, "val/accuracy")
    check_nesting(f"sqlite:///{tmp_path / 'mlflow.db'}", folder)


def test_a_population_finds_a_schedule_that_its_recipe_replays(
    tmp_path: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "open_index", context.open_index)  # put back what the replay here replaces
    monkeypatch.setattr(finetune, "keep_features", finetune.keep_features)
    space = {"optim.lr": {"low": 1e-5, "high": 0.05, "log": True}, "model.fusion.temperature": [0.3, 1.0, 3.0]}
    keys = {"space": space, "samples": 3, "scheduler": "pbt", "seeds": 1}
    settings = tree(tmp_path, "clean", **keys)
    settings["training"] = {"steps": 40, "eval_every": 10, "log_every": 40, "save_every": 40}
    settings["search"]["interval"] = 20
    result = search(parse_recipe(settings), "planted_run:run_trial")
    folder = tmp_path / "clean"
    assert [trial.status for trial in result.trials] == ["finished"] * 3
    assert any(trial.schedule for trial in result.trials) and "then after" in result.table()
    board = json.loads((folder / "leaderboard.json").read_text())
    assert [row["overrides"] for row in board] == [trial.overrides for trial in result.trials]
    assert [path.name for path in (folder / "figures").iterdir()] == ["schedules.png"]
    check_values(known_trials(folder), "val/accuracy")
    check_nesting(f"sqlite:///{tmp_path / 'mlflow.db'}", folder)
    started = {path.name: path.read_text() for path in folder.glob("member??-??????.started")}
    assert list(started.values()) == ["xx"] * 3, "a stretch of a trial was doubled or lost"

    winner = next(trial for trial in result.trials if trial.schedule)
    stored = Path(winner.command.split()[3])
    again = load_recipe(stored, [f"run.name={winner.name}-again", "data.test=[]", "tracking.enabled=false"])
    assert again.training.schedule
    replayed = run_trial(again, lambda step, metrics: None, "")
    own = [one for one in known_trials(folder) if one.name == winner.name]
    # The trial's own process rounds otherwise, by where its memory lies.
    assert (replayed["step"], replayed["value"]) == (own[0].step, pytest.approx(own[0].value, abs=1e-6))
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in (winner.name, again.run.name)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)


def test_where_nothing_is_degraded_no_winner_is_claimed(tmp_path: Path, ray_cluster: Any) -> None:
    settings = tree(tmp_path, "clean") | {"tracking": {"enabled": False}}
    result = search(parse_recipe(settings), "planted_run:run_trial")
    assert result.verdict.startswith("no gate beat averaging")
    assert [len(trial.by_seed) for trial in result.trials[:1]] == [2]
    if "averaging (mean) itself" not in result.verdict:
        assert "luck between trainings is not excluded" in result.verdict
