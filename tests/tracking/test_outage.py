"""A real MLflow server over HTTP that is killed in mid-run and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from free_ports import free_port
from mlflow import MlflowClient

from crossgate.config import Recipe, TrackingConfig
from crossgate.recipe import flat_recipe, parse_recipe
from crossgate.tracking import conclude, connect, known_run, open_tracker


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A server process with SQLite and proxied artifacts; killed hard at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            try:
                if requests.get(f"{url}/health", timeout=1).ok:
                    break
            except requests.RequestException:
                time.sleep(0.2)
        else:
            pytest.fail("the server did not start")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_metrics_survive_a_server_killed_in_mid_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    recipe = parse_recipe({"kind": "pretrain", "tracking": {"uri": f"http://127.0.0.1:{port}"}})

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            tracker.log_metrics({"loss": 1.0 / (step + 1), "lr": step * 1e-3}, step)

    with mlflow_server(tmp_path, port):
        tracker = open_tracker(recipe, tmp_path / "runs" / "one", 0, interval=0.2)
        steps(0, 500)
        time.sleep(1.0)  # some are delivered
        steps(500, 600)  # likely in flight when the server dies
    steps(600, 2000)
    tracker.log_text("while it was away", "note.txt")
    for _ in range(600):
        if "does not take data" in caplog.text:
            break
        time.sleep(0.1)
    steps(2000, 2500)
    assert caplog.text.count("does not take data") == 1

    with mlflow_server(tmp_path, port):
        steps(2500, 2600)
        tracker.finish(timeout=120)
        client = connect(TrackingConfig(uri=f"http://127.0.0.1:{port}"), tmp_path).client
        for key in ("loss", "lr"):
            assert [m.step for m in client.get_metric_history(tracker.run_id, key)] == list(range(2600))
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert {f.path for f in client.list_artifacts(tracker.run_id)} == {"note.txt", "recipe.yaml"}
        assert len(client.search_runs([run.info.experiment_id])) == 1
    assert "is back" in caplog.text


@pytest.mark.slow
def test_a_trial_that_starts_and_trains_while_the_server_is_away_is_nested_and_whole(tmp_path: Path) -> None:
    port = free_port()
    recipe = parse_recipe({"kind": "finetune", "tracking": {"uri": f"http://127.0.0.1:{port}"}})
    with mlflow_server(tmp_path, port):
        parent = open_tracker(recipe, tmp_path / "runs" / "search", 0, interval=0.2)
    ended = open_tracker(recipe, tmp_path / "runs" / "ended", 0, parent=parent.run_id, interval=0.2)
    lasting = open_tracker(recipe, tmp_path / "runs" / "lasting", 0, parent=parent.run_id, interval=0.2)
    for trial in (ended, lasting):
        trial.log_dataset("shards:train", "a" * 64, "s3://bucket/shards", "train", {"clips": 7})
        for step in range(500):
            trial.log_metrics({"loss": 1.0 / (step + 1)}, step)
    ended.finish(timeout=0.5)
    ended._delivery._thread.join(60)  # or it may send after all when the server is there
    assert ended.run_id == lasting.run_id == ""

    with mlflow_server(tmp_path, port):
        for step in range(500, 600):
            lasting.log_metrics({"loss": 1.0 / (step + 1)}, step)
        lasting.finish(timeout=120)
        conclude(tmp_path / "runs" / "ended", recipe.tracking, "FAILED")
        parent.finish(timeout=120)
        client = connect(recipe.tracking, tmp_path).client
        _is_whole(client, known_run(tmp_path / "runs" / "ended"), recipe, parent.run_id, 500)
        _is_whole(client, lasting.run_id, recipe, parent.run_id, 600)
        assert len(client.search_runs([client.get_run(parent.run_id).info.experiment_id])) == 3


def _is_whole(client: MlflowClient, run_id: str, recipe: Recipe, parent: str, steps: int) -> None:
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.params == flat_recipe(recipe)
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == list(range(steps))
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["shards:train"]
    assert {f.path for f in client.list_artifacts(run_id)} == {"recipe.yaml"}
