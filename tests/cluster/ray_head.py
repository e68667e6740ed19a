"""A Ray head of a test's own, and jobs submitted to it as a user does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for scripts
from free_ports import free_ports

_NO_AGENT = "No available agent to submit job, please try again later"  # a head answers before its agent does
ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


def job_environment() -> dict[str, str]:
    path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is this one
    return {**os.environ, "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", "PATH": path}


@dataclass(frozen=True)
class Head:
    """A Ray head of this test's own: its addresses for jobs and for drivers, and its first process."""

    address: str
    cluster: str
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


@contextmanager
def ray_head(cpus: int = 4) -> Iterator[Head]:
    """A Ray head with a dashboard, for as long as the block lasts."""
    gcs, dashboard, agent = free_ports(3)
    # Ray's sockets live below this path, and their names may have 107 characters at most.
    temp = Path("/tmp") / f"cg{os.getpid()}"
    command = [RAY, "start", "--head", "--block", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}"]
    process = subprocess.Popen(
        [*map(str, command), f"--dashboard-port={dashboard}", f"--temp-dir={temp}", "--include-dashboard=true"]
        # Its usual port is every Ray's of this machine; a head whose agent finds it taken runs no job.
        + [f"--dashboard-agent-listen-port={agent}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=job_environment(),
    )
    started = psutil.Process(process.pid)
    try:
        _wait_for(dashboard)
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", started)
    finally:
        family = [*started.children(recursive=True), started]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=3)
        for one in alive:
            one.kill()
        shutil.rmtree(temp, ignore_errors=True)


@dataclass(frozen=True)
class Submitter:
    """Submits jobs from a checkout to a head."""

    head: Head
    checkout: Path

    def start(self, job: str, recipe: Path, *settings: str) -> subprocess.Popen[str]:
        """Submits a job and follows it; `said` waits for its end."""
        words = [RAY, "job", "submit", "--address", self.head.address, "--working-dir", self.checkout, "--"]
        return _followed([*map(str, words), "python", f"jobs/{job}.py", "--config", str(recipe), *settings])

    def said(self, job: subprocess.Popen[str]) -> str:
        """Returns what a job that succeeded has said."""
        for _ in range(20):
            said, _ = job.communicate(timeout=600)
            if _NO_AGENT not in said:
                break
            time.sleep(1)
            job = _followed(job.args)
        assert job.returncode == 0, said[-3000:]
        return said

    def __call__(self, job: str, recipe: Path, *settings: str) -> str:
        return self.said(self.start(job, recipe, *settings))


def _followed(words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=job_environment())


def _wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)


def checkout(folder: Path) -> Path:
    """Copies what a user's checkout ships, without environments and runs of this machine; returns the folder."""
    for name in ("platform", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder
