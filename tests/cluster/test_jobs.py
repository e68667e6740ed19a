"""`ray start --head` and `ray job submit` of every kind of run; a killed pretraining is submitted again and goes on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from tiny_road import tiny_tree

from crossgate.evaluation import read_results
from crossgate.recipe import load_recipe
from crossgate.runs.context import run_directory
from crossgate.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def environment() -> dict[str, str]:
    path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is this one
    return {**os.environ, "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", "PATH": path}


@dataclass(frozen=True)
class Head:
    """A Ray head of this test's own: its address for jobs, and its first process."""

    address: str
    process: psutil.Process

    def kill(self, *words: str) -> int:
        """Kills those of the head's own descendants whose command line has one of the words; returns how many."""
        killed = 0
        for child in self.process.children(recursive=True):
            try:
                if any(word in " ".join(child.cmdline()) for word in words):
                    child.kill()
                    killed += 1
            except psutil.NoSuchProcess:
                continue
        return killed


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head with a dashboard."""
    gcs, dashboard = free_ports(2)
    # Ray's sockets live below this path, and their names may have 107 characters at most.
    temp = Path("/tmp") / f"cg{os.getpid()}"
    command = [RAY, "start", "--head", "--block", f"--port={gcs}", "--dashboard-host=127.0.0.1", "--num-cpus=4"]
    process = subprocess.Popen(
        [*map(str, command), f"--dashboard-port={dashboard}", f"--temp-dir={temp}", "--include-dashboard=true"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(),
    )
    for _ in range(120):
        try:
            socket.create_connection(("127.0.0.1", dashboard), timeout=1).close()
            break
        except OSError:
            time.sleep(0.5)
    time.sleep(3)
    started = psutil.Process(process.pid)
    yield Head(f"http://127.0.0.1:{dashboard}", started)
    family = [*started.children(recursive=True), started]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=8)
    for one in alive:
        one.kill()
    shutil.rmtree(temp, ignore_errors=True)


@dataclass(frozen=True)
class Submitter:
    """Submits jobs from a checkout to a head."""

    address: str
    checkout: Path

    def command(self, job: str, recipe: Path) -> list[str]:
        words = [RAY, "job", "submit", "--address", self.address, "--working-dir", self.checkout, "--"]
        return [*map(str, words), "python", f"jobs/{job}.py", "--config", str(recipe)]

    def __call__(self, job: str, recipe: Path) -> str:
        for _ in range(20):
            done = subprocess.run(
                self.command(job, recipe), capture_output=True, text=True, timeout=400, env=environment()
            )
            if "No available agent to submit job, please try again later" not in done.stderr:
                break
            time.sleep(2)  # the head answers before its agent does
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's checkout ships: the package and the jobs, without environments and runs of this machine."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("platform", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


def curve(directory: Path) -> list[tuple[int, float]]:
    name = "train/loss/total"
    return [(row["step"], row[name]) for row in read_metrics(directory) if name in row]


def write(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_kind_of_job_and_a_resumed_pretraining(road: Path, head: Head, checkout: Path, tmp_path: Path) -> None:
    submit = Submitter(head.address, checkout)
    steps = {"steps": 24, "log_every": 1, "eval_every": 12, "save_every": 4}
    tree = tiny_tree(road, tmp_path / "runs", "pretrain", training=steps, cluster={"launcher": "ray", "workers": 2})
    recipe = write(tmp_path / "job.yaml", tree)

    undisturbed = write(tmp_path / "still.yaml", {**tree, "run": {"output": str(tmp_path / "still"), "name": "run"}})
    submit("pretrain", undisturbed)

    directory = run_directory(load_recipe(recipe))
    process = subprocess.Popen(
        submit.command("pretrain", recipe), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    )  # fmt: skip
    until = time.monotonic() + 200
    while not list((directory / "checkpoints").glob("step-*")) and time.monotonic() < until:
        time.sleep(0.2)
    assert head.kill("jobs/pretrain.py", "RayTrainWorker") >= 3, "a driver and two ranks"
    process.communicate(timeout=120)
    assert 0 < len(curve(directory)) < 24, "the job was over before it was killed"

    said = submit("pretrain", recipe)
    assert "resumed from" in said
    assert len(curve(directory)) == 24
    assert curve(directory) == curve(tmp_path / "still" / "run")

    sections = {"finetune": {"task": "violence", "init": str(directory)}}
    tuned = write(tmp_path / "tune.yaml", tiny_tree(road, tmp_path / "runs", "finetune", **sections))
    submit("finetune", tuned)
    tuned_directory = run_directory(load_recipe(tuned))
    assert "test/average_precision" in read_results(tuned_directory / "results.json")[0]

    space = {"space": {"model.fusion.name": ["mean", "softmax"]}, "concurrent": 2, "metric": "val/average_precision"}
    searched = write(tmp_path / "search.yaml", tiny_tree(road, tmp_path / "runs", "search", search=space, **sections))
    said = submit("search", searched)
    assert "model.fusion.name=mean" in said
    assert "model.fusion.name=softmax" in said

    measured = tiny_tree(road, tmp_path / "runs", "evaluate", evaluation={"model": str(tuned_directory)})
    evaluation = write(tmp_path / "measure.yaml", measured)
    submit("evaluate", evaluation)
    assert (run_directory(load_recipe(evaluation)) / "report.html").exists()
