"""What `authOptions` of the manifests means: a real dashboard, as KubeRay starts it, answers 401 without the token."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from free_ports import free_ports
from kuberay import wait_for
from manifests import SETS, objects_of, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.ray]
TOKEN = 32 * "5e"


def modes() -> set[str]:
    clusters = [ray_cluster(thing) for name in SETS for thing in objects_of(name)]
    return {cluster["authOptions"]["mode"] for cluster in clusters if cluster}


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The address of a head's dashboard that is told what KubeRay tells it."""
    gcs, port = free_ports(2)
    (mode,) = modes()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--port={gcs}", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1"]
    temp = Path(f"/tmp/cgt{os.getpid()}")  # sockets lie below it, and their names may have 107 characters at most
    process = subprocess.Popen(
        [*command, f"--temp-dir={temp}"],
        env={**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": TOKEN},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: status(f"{url}/api/gcs_healthz") == 200, "no dashboard", 90, pause=0.3)
        yield url
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)  # the agents, which Ray gives groups of their own, notice and end
        for one in psutil.wait_procs(family, timeout=10)[1]:
            one.kill()
        process.wait()
        shutil.rmtree(temp, ignore_errors=True)


def status(url: str, token: str = "") -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return requests.get(url, headers=headers, timeout=30).status_code
    except requests.RequestException:
        return 0


def test_dashboard_answers_those_who_have_the_token(dashboard: str) -> None:
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
        assert status(dashboard + path) == 401
        assert status(dashboard + path, 64 * "0") in (401, 403)
    assert status(f"{dashboard}/api/jobs/", TOKEN) == 200
