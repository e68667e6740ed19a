"""Starting runs: here, under torchrun's variables, on Ray Train; and what comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tiny_run import losses, run_fit, tiny_recipe

from crossgate.cluster.paths import with_absolute_paths
from crossgate.cluster.ray_train import _Mail, launch
from crossgate.errors import UserError
from crossgate.recipe import parse_recipe
from crossgate.training.checkpoint import newest_whole
from crossgate.training.requests import Preempted

ENTRY = "tiny_run:run"
RAY = {"workers": 2, "launcher": "ray", "max_failures": 2}


@pytest.mark.ray
def test_an_outage_and_a_killed_worker_are_restarts_and_the_curve_is_the_undisturbed_one(tmp_path, ray_cluster):
    faults = {"task": "outage@6+die@10"}
    recipe = tiny_recipe(tmp_path, "run", cluster=RAY, engine={"zero_stage": 2}, finetune=faults)
    recipe.tracking.uri = "http://ann:s3cret@host"
    result = launch(recipe, ENTRY)
    assert (tmp_path / "run" / "outage-fuse").exists() and (tmp_path / "run" / "die-fuse").exists()
    assert (result["ranks"], result["step"], result["resumed_from"]) == (2, 12, 8)
    assert not (tmp_path / "run" / ".launch").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    run_fit(tiny_recipe(tmp_path, "one-rank", engine={"zero_stage": 2}))
    curve = losses(tmp_path, "run")
    assert len(curve) == 12
    assert curve == pytest.approx(losses(tmp_path, "one-rank"), rel=0, abs=2e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_hangs_is_ended_and_started_again(tmp_path, ray_cluster):
    recipe = tiny_recipe(tmp_path, "run", cluster=RAY, finetune={"task": "hang@10"}, training={"watchdog_s": 10})
    result = launch(recipe, ENTRY)
    assert (result["ranks"], result["step"], result["resumed_from"]) == (2, 12, 8)
    reports = [(tmp_path / "run" / "hangs" / f"rank-0000{rank}.before.txt").read_text() for rank in range(2)]
    assert reports[1].startswith("rank 1: load of step 10")
    assert "of step 10" in reports[0].splitlines()[0]


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_of_the_driver_lets_all_ranks_save(tmp_path, ray_cluster):
    recipe = tiny_recipe(tmp_path, "run", cluster=RAY, finetune={"task": "interrupt@6"}, training={"save_every": 100})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "driver").write_text(str(os.getpid()))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Preempted) as ended:
        launch(recipe, ENTRY)
    assert ended.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    newest, _ = newest_whole(tmp_path / "run")
    assert newest is not None and 6 <= newest.step < 12
    result = launch(recipe, ENTRY)
    assert (result["step"], result["resumed_from"]) == (12, newest.step)
    assert len(losses(tmp_path, "run")) == 12


@pytest.mark.ray
def test_a_users_error_in_a_worker_arrives_as_the_same_line(tmp_path, ray_cluster):
    recipe = tiny_recipe(tmp_path, "run", cluster=RAY, finetune={"task": "complain"})
    with pytest.raises(UserError) as caught:
        launch(recipe, ENTRY)
    assert str(caught.value) == "shards/: no such index; run `crossgate pack`"


def test_one_worker_runs_here_and_resumes(tmp_path):
    recipe = tiny_recipe(tmp_path, "run")
    assert launch(recipe, ENTRY)["resumed_from"] == 0
    assert launch(recipe, ENTRY)["resumed_from"] == 12


def test_a_users_error_is_the_same_here(tmp_path):
    with pytest.raises(UserError, match="no such index"):
        launch(tiny_recipe(tmp_path, "run", finetune={"task": "complain"}), ENTRY)


def test_paths_become_absolute_and_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(
        {
            "kind": "finetune",
            "run": {"name": "x", "output": "runs"},
            "data": {"index": "s3://b/x", "mix": [{"index": "more"}, {"index": "https://h/x"}]},
            "finetune": {"init": "a"},
            "release": {"index": "shards"},
            "evaluation": {"model": "runs/b"},
            "tracking": {"uri": "sqlite:///tracks/mlflow.db"},
        }
    )
    fixed = with_absolute_paths(recipe)
    assert fixed.run.output == str(tmp_path / "runs")
    assert fixed.data.index == "s3://b/x"
    assert [corpus.index for corpus in fixed.data.mix] == [str(tmp_path / "more"), "https://h/x"]
    assert fixed.release.index == str(tmp_path / "shards")
    assert fixed.finetune.init == str(tmp_path / "a")
    assert fixed.evaluation.model == str(tmp_path / "runs" / "b")
    assert fixed.tracking.uri == f"sqlite:///{tmp_path}/tracks/mlflow.db"
    assert with_absolute_paths(fixed) == fixed
    assert fixed.engine.deepspeed == ""
    assert (recipe.run.output, recipe.data.mix[0].index) == ("runs", "more")


def test_a_job_keeps_its_runs_outside_the_folder_that_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = parse_recipe({"kind": "pretrain", "data": {"index": "shards"}, "finetune": {"init": "runs/a"}})
    recipe.evaluation.model, recipe.tracking.uri = "runs/b", "sqlite:///mlflow.db"
    fixed = with_absolute_paths(recipe)
    assert fixed.run.output == "/home/someone/crossgate/runs"
    assert fixed.finetune.init == "/home/someone/crossgate/runs/a"
    assert fixed.evaluation.model == "/home/someone/crossgate/runs/b"
    assert fixed.tracking.uri == "sqlite:////home/someone/crossgate/mlflow.db"
    assert fixed.data.index == str(tmp_path / "shards")  # it travelled with the job
    monkeypatch.setenv("CROSSGATE_HOME", "/mnt/shared")
    assert with_absolute_paths(recipe).run.output == "/mnt/shared/runs"


@pytest.mark.slow  # two starts of Ray Train
def test_a_job_submitted_again_is_the_same_run_whatever_its_folder_is_called(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("CROSSGATE_HOME", str(tmp_path / "home"))
    for name, resumed_from in (("_ray_pkg_1f", 0), ("_ray_pkg_2e", 12)):
        folder = tmp_path / "working_dir_files" / name
        (folder / "start").mkdir(parents=True)
        (folder / "ds.json").write_text('{"wall_clock_breakdown": false}')
        monkeypatch.chdir(folder)
        recipe = tiny_recipe(Path("runs"), "run", engine={"deepspeed": "ds.json"}, finetune={"init": "start"})
        assert launch(recipe, ENTRY)["resumed_from"] == resumed_from
        shutil.rmtree(folder)  # as Ray does some time after the job


def test_runs_on_object_storage_are_refused_in_one_line():
    recipe = parse_recipe({"kind": "pretrain", "run": {"name": "run", "output": "s3://b/runs"}})
    with pytest.raises(UserError, match="run.output: runs cannot be kept at 's3://b/runs'"):
        launch(recipe, ENTRY)


def test_mail_waits_for_every_rank_and_keeps_the_error_whole(tmp_path):
    with _Mail.fresh(tiny_recipe(tmp_path, "run")) as mail:
        mail.raise_complaint()
        mail.complain(1, UserError("broken", where=Path("a.tar"), expected="whole", cure="pack again"))
        assert not mail.all_complain(2, patience_s=0.1)
        mail.complain(0, UserError("broken", where=Path("a.tar"), expected="whole", cure="pack again"))
        assert mail.all_complain(2)
        with pytest.raises(UserError) as caught:
            mail.raise_complaint()
        assert str(caught.value) == "a.tar: broken; expected whole; pack again"
        mail.deliver({"step": 3})
        assert json.loads((mail.folder / "result.json").read_text()) == {"step": 3}
        assert mail.result() == {"step": 3}
