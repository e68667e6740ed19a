"""The driver of a run is killed, then the whole head: started again each time, the run goes on by its name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_head import Head, job_environment, ray_head
from tiny_run import losses, run_fit, tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("killed_run.py")


def drive(folder: Path, head: Head, wait_at: int = 0) -> subprocess.Popen[str]:
    """Starts the run as a driver on this machine."""
    command = [sys.executable, str(SCRIPT), str(folder), head.cluster, str(wait_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=job_environment())


def wait_for(waits: Path, driver: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 200
    while not waits.exists():
        assert driver.poll() is None and time.monotonic() < until, driver.communicate(timeout=5)[1][-3000:]
        time.sleep(0.1)


def test_a_killed_driver_and_a_killed_head_cost_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    with ray_head(cpus=2) as head:
        driver = drive(tmp_path, head, wait_at=7)
        wait_for(tmp_path / "waits-7", driver)
        driver.kill()
        driver.communicate()
        again = drive(tmp_path, head, wait_at=11)
        wait_for(tmp_path / "waits-11", again)
        assert head.kill("gcs_server", "raylet") >= 2
        again.kill()  # where a job's driver runs on the head, that is gone with it
        again.communicate()
    run_fit(tiny_recipe(tmp_path, "calm", engine={"zero_stage": 2}))
    with ray_head(cpus=2) as head:
        said, complaint = drive(tmp_path, head).communicate(timeout=200)
    assert said, complaint[-3000:]
    begun = {int(path.name.removeprefix("begins-")) for path in tmp_path.glob("begins-*")}
    assert begun == {1, 7, 9}, "after the checkpoints of steps 6 and 8"
    assert json.loads(said.splitlines()[-1]) == {"step": 12, "resumed_from": 8}
    assert losses(tmp_path, "run") == pytest.approx(losses(tmp_path, "calm"), rel=0, abs=2e-5)
