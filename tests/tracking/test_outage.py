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

from crossgate.config import TrackingConfig
from crossgate.recipe import parse_recipe
from crossgate.tracking import connect, open_tracker


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
