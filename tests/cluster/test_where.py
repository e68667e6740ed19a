"""Where a run starts, and what its processes may take of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crossgate import environment
from crossgate.cluster import ray_train
from crossgate.cluster.paths import with_absolute_paths
from crossgate.cluster.session import use_reserved
from crossgate.errors import UserError
from crossgate.recipe import parse_recipe


def here(monkeypatch: pytest.MonkeyPatch, *, torchrun: bool = False, job: bool = False, **cluster: object) -> bool:
    monkeypatch.setattr(environment, "torchrun_world", lambda: (0, 0, 8) if torchrun else None)
    monkeypatch.setattr(environment, "in_ray_job", lambda: job)
    return ray_train._here(parse_recipe({"kind": "pretrain", "data": {"global_batch": 8}, "cluster": cluster}))


def test_torchruns_ranks_never_start_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here(monkeypatch, torchrun=True, workers=8)
    assert here(monkeypatch, torchrun=True, workers=8, launcher="ray")


def test_a_rays_job_gets_a_worker_even_for_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here(monkeypatch, workers=1)
    assert not here(monkeypatch, workers=1, job=True)
    assert not here(monkeypatch, workers=2)
    assert here(monkeypatch, workers=1, job=True, launcher="local")


def test_a_gpu_that_is_not_there_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = parse_recipe({"kind": "pretrain", "cluster": {"gpus_per_worker": 1}})
    with pytest.raises(UserError, match=r"cluster\.gpus_per_worker.*set it to 0"):
        ray_train.launch(recipe)


def test_a_process_keeps_to_what_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    try:
        use_reserved(cpus=1, gpus=1)
        assert environment.snapshot()["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert torch.get_num_threads() == 1
        use_reserved(cpus=2.5, gpus=0)
        assert environment.snapshot()["CUDA_VISIBLE_DEVICES"] == ""
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_paths_that_a_search_sets_are_looked_up_where_the_recipes_own_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a job's copy of the working folder what is read may be missing, and what is written goes home in any case."""
    home, copy = tmp_path / "home", tmp_path / "copy"
    (copy / "here").mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("CROSSGATE_HOME", str(home))
    space = {
        "finetune.init": {"values": ["enc-a", "here"]},
        "finetune.features": ["kept"],
        "model.fusion.temperature": {"low": 0.1, "high": 1.0, "when": {"finetune.init": ["enc-a"]}},
        "model.fusion.name": ["mean"],
    }
    explore = {"data.index": "small", "data.train": ["small"], "data.mix": [{"index": "s3://b/x"}, {"index": "other"}]}
    given = {"kind": "search", "data": {"index": "whole"}, "search": {"space": space, "samples": 4, "explore": explore}}
    found = with_absolute_paths(parse_recipe(given))
    assert found.data.index == f"{home}/whole"
    assert found.search.explore == {
        "data.index": f"{home}/small",
        "data.train": ["small"],
        "data.mix": [{"index": "s3://b/x"}, {"index": f"{home}/other"}],
    }
    assert found.search.space["finetune.init"].values == [f"{home}/enc-a", f"{copy}/here"]
    assert found.search.space["model.fusion.temperature"].when == {"finetune.init": [f"{home}/enc-a"]}
    assert found.search.space["finetune.features"] == [f"{home}/kept"]
    assert found.search.space["model.fusion.name"] == ["mean"]
    assert with_absolute_paths(found) == found


def test_the_tracking_server_of_the_environment_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert with_absolute_paths(parse_recipe({"kind": "pretrain"})).tracking.uri == "http://mlflow:5000"
    own = parse_recipe({"kind": "pretrain", "tracking": {"uri": "http://mine:1"}})
    assert with_absolute_paths(own).tracking.uri == "http://mine:1"
