"""What a command hands on: units of depth, the next step after a search, runs that lie where a Ray job left them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from crossgate import environment
from crossgate.cli import app
from crossgate.recipe import dump_recipe, load_recipe, parse_recipe
from crossgate.registry.predictor import Settings
from crossgate.runs import predict, release
from crossgate.runs.summary import describe_search


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The model and the items that predictors are asked for."""
    seen: list[object] = []

    class Asked:
        def __init__(self, model: Path, settings: Settings) -> None:
            seen.extend((model, settings))

        def predict(self, items: list[dict[str, str]]) -> pd.DataFrame:
            seen.extend(items)
            return pd.DataFrame(columns=["source", "error"])

    monkeypatch.setattr(predict, "Predictor", Asked)
    return seen


def test_the_unit_of_depth_files_reaches_the_predictor(asked: list[object]) -> None:
    words = ["predict", "model", "a.mp4", "b.mp4", "--depth", "a.mkv", "--depth", "", "--depth-unit", "cm"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert asked[2:] == [{"source": "a.mp4", "depth": "a.mkv", "depth_unit": "cm"}, {"source": "b.mp4"}]


def test_bounds_reach_the_predictor_and_what_is_not_given_has_its_default(asked: list[object]) -> None:
    assert CliRunner().invoke(app, ["predict", "model", "a.mp4", "--seconds", "900"]).exit_code == 0
    assert asked[1] == Settings(seconds=900)


def test_a_job_finds_runs_where_jobs_leave_them(
    asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSGATE_HOME", str(tmp_path))
    assert CliRunner().invoke(app, ["predict", "runs/mine", "a.mp4"]).exit_code == 0
    assert asked[0] == tmp_path / "runs" / "mine"
    found: list[Path] = []

    def noted(run: Path, **rest: object) -> None:
        found.append(run)
        raise SystemExit(0)

    monkeypatch.setattr(release, "release_run", noted)
    CliRunner().invoke(app, ["release", "runs/mine"])
    assert found == [tmp_path / "runs" / "mine"]


def test_a_search_says_how_to_go_on_and_that_recipe_is_valid(tmp_path: Path) -> None:
    frozen = {"task": "violence", "freeze": True, "features": str(tmp_path / "features")}
    run = {"name": "gates", "output": str(tmp_path)}
    optim = {"lr": 0.01, "weight_decay": 3.0}
    recipe = parse_recipe({"kind": "search", "run": run, "finetune": frozen, "optim": optim})
    best = tmp_path / "gates" / "name-softmax"
    best.mkdir(parents=True)
    (best / "recipe.yaml").write_text(dump_recipe(recipe))
    lines = describe_search(recipe, best).splitlines()
    assert lines[:2] == [f"run      {tmp_path / 'gates'}", f"best     {best}"]
    words = shlex.split(lines[2].removeprefix("next: "))
    assert words[:3] == ["crossgate", "finetune", "--config"]
    following = load_recipe(words[3], ["kind=finetune", *words[4:]])
    assert (following.run.name, following.run.output) == ("violence-gates", str(tmp_path))
    assert (following.finetune.init, following.finetune.freeze) == (str(best), False)
    assert (following.optim.lr, following.optim.weight_decay) == (1e-3, 0.05), "the gate's own are not for encoders"


def test_cores_are_counted_where_the_system_keeps_no_list_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert environment.usable_cores() == 3
