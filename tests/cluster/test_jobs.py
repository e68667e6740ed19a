"""`ray start --head` and `ray job submit` of every kind of run; a killed pretraining is submitted again and goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import Submitter, checkout, job_environment, ray_head
from tiny_road import tiny_tree

from crossgate.evaluation import read_results
from crossgate.recipe import load_recipe
from crossgate.runs.context import run_directory
from crossgate.training.metrics import read_metrics

STEPS = 48  # a few seconds of them are left when the first checkpoint is seen
TOLERANCE = 2e-5  # vector kernels round by where memory lies, which no two processes share

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def undisturbed(road: Path, shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    """The same two ranks under torchrun, without Ray, while the head starts."""
    output = tmp_path_factory.mktemp("still")
    keys = {"run": {"output": str(output), "name": "run"}, "tracking": {"enabled": False}}
    recipe = write(output / "still.yaml", pretraining(road, output) | keys | {"cluster": {"launcher": "local"}})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(shipped / "jobs" / "pretrain.py"), "--config", str(recipe)]
    with (output / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=job_environment())
    yield Undisturbed(process, output)
    process.kill()


@pytest.fixture(scope="module")
def submit(undisturbed: Undisturbed, shipped: Path) -> Iterator[Submitter]:
    with ray_head() as head:
        yield Submitter(head, shipped)


def curve(directory: Path) -> list[tuple[int, float]]:
    name = "train/loss/total"
    return [(row["step"], row[name]) for row in read_metrics(directory) if name in row]


def write(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def pretraining(road: Path, output: Path) -> dict[str, Any]:
    steps = {"steps": STEPS, "log_every": 1, "eval_every": 24, "save_every": 4}
    return tiny_tree(road, output, "pretrain", training=steps, cluster={"launcher": "ray", "workers": 2})


@dataclass(frozen=True)
class Undisturbed:
    """A pretraining that nobody kills."""

    process: subprocess.Popen[bytes]
    output: Path

    def curve(self) -> list[tuple[int, float]]:
        assert self.process.wait(timeout=300) == 0, (self.output / "log").read_text()[-3000:]
        return curve(self.output / "run")


def test_every_kind_of_job_and_a_resumed_pretraining(
    road: Path, undisturbed: Undisturbed, submit: Submitter, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "job.yaml", pretraining(road, tmp_path / "runs"))
    directory = run_directory(load_recipe(recipe))
    killed = submit.start("pretrain", recipe)
    until, said = time.monotonic() + 300, ""
    while not list((directory / "checkpoints").glob("step-*")) and time.monotonic() < until:
        if killed.poll() is not None:  # the head was not ready to start jobs
            said = killed.communicate()[0][-3000:]
            killed = submit.start("pretrain", recipe)
        time.sleep(0.05)
    assert submit.head.kill("jobs/pretrain.py", "RayTrainWorker") >= 3, f"a driver and two ranks: {said}"
    killed.communicate(timeout=120)
    assert 0 < len(curve(directory)) < STEPS, "the job was over before it was killed"

    space = {"space": {"model.fusion.name": ["mean", "softmax"]}, "metric": "val/average_precision"}
    tree = tiny_tree(road, tmp_path / "runs", "search", search=space, finetune={"task": "violence"})
    searched = write(tmp_path / "search.yaml", tree)
    searching = submit.start("search", searched)
    said = submit("pretrain", recipe)
    assert "resumed from" in said
    steps, losses = zip(*curve(directory))
    expected_steps, expected = zip(*undisturbed.curve())
    assert steps == expected_steps == tuple(range(1, STEPS + 1))
    assert losses == pytest.approx(expected, rel=0, abs=TOLERANCE)

    sections = {"finetune": {"task": "violence", "init": str(directory)}, "tracking": {"enabled": False}}
    tuned = write(tmp_path / "tune.yaml", tiny_tree(road, tmp_path / "runs", "finetune", **sections))
    submit("finetune", tuned)
    tuned_directory = run_directory(load_recipe(tuned))
    assert "test/average_precision" in read_results(tuned_directory / "results.json")[0]

    sections = {"evaluation": {"model": str(tuned_directory)}, "tracking": {"enabled": False}}
    evaluation = write(tmp_path / "measure.yaml", tiny_tree(road, tmp_path / "runs", "evaluate", **sections))
    submit("evaluate", evaluation)
    assert (run_directory(load_recipe(evaluation)) / "report.html").exists()

    said = submit.said(searching)
    assert "model.fusion.name=mean" in said
    assert "model.fusion.name=softmax" in said
