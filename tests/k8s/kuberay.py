"""What the KubeRay operator 1.7 makes of a RayJob, on a node of `pods`: commands, environment, token, submitter.

After its pod.go (`generateRayStartCommand`, `setContainerEnvVars`) and job.go (`BuildJobSubmitCommand`).
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from typing import Any

from manifests import Object, quantity
from pods import Node, limited, podman

SUBMITTER = {"cpu": "1", "memory": "1Gi"}
"""Limits of KubeRay's submitter."""
_SHELL = ["/bin/bash", "-c", "--"]
_HEALTHY = "import urllib.request; urllib.request.urlopen('http://localhost:8265/api/gcs_healthz', timeout=2)"


class RayCluster:
    """Head and worker of one RayJob, on a network where they meet by the head's service.

    Args:
        node: where they run.
        job: the rendered RayJob.
        env: what both are given besides, such as credentials.
    """

    def __init__(self, node: Node, job: Object, env: dict[str, str]) -> None:
        self.node, self.job = node, job
        spec = job["spec"]["rayClusterSpec"]
        self.head_group, (self.worker_group,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
        self.name = f"{job['metadata']['name']}-{secrets.token_hex(3)}"
        self.service = f"{self.name}-head-svc"
        self.token = secrets.token_hex(32)
        self.env = {**env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_CLUSTER_NAME": self.name}
        self.head = self.worker = ""

    def start(self) -> None:
        """Runs the head's init containers, then head and worker; returns when Ray counts the worker's CPUs."""
        pod = self.head_group["template"]["spec"]
        for step in pod.get("initContainers", ()):
            self.node.run(f"{self.name}-head", pod, step, step["command"])
        self.head = self._start(self.head_group, "head", "127.0.0.1", "ray start --head", {"dashboard-host": "0.0.0.0"})
        self.node.hosts[self.service] = self.node.hosts[f"{self.name}-head"]
        address = {"address": f"{self.service}:6379"}
        self.worker = self._start(self.worker_group, "worker", self.service, "ray start", address)
        wait_for(lambda: self.cpus() == 1.0, "the worker did not join")

    def _start(self, group: Object, kind: str, ip: str, program: str, parameters: dict[str, str]) -> str:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        limits = container["resources"]["limits"]
        made = {
            "num-cpus": str(math.ceil(quantity(limits["cpu"]))),
            "memory": str(int(quantity(limits["memory"]))),
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": "52365",
        }
        words = [f"--{key}={value}" for key, value in sorted({**made, **parameters, **group["rayStartParams"]}.items())]
        command = f"ulimit -n 65536; {program} --block {' '.join(words)}"
        env = {**self.env, "RAY_PORT": "6379", "RAY_ADDRESS": f"{ip}:6379", "KUBERAY_GEN_RAY_START_CMD": command}
        return self.node.start(f"{self.name}-{kind}", pod, container, [*_SHELL, command], env=env)

    def cpus(self) -> float:
        """CPUs that Ray counts."""
        ask = (
            "import ray; ray.init(address='auto', logging_level='ERROR'); print(ray.cluster_resources().get('CPU', 0))"
        )
        said = podman("exec", self.head, "python", "-c", ask, check=False, timeout=120).strip().splitlines()
        try:
            return float(said[-1])
        except (IndexError, ValueError):
            return 0.0

    def asked(self, *headers: str) -> str:
        """The dashboard's answer to a question for its jobs, with its status line."""
        words = [word for header in headers for word in ("--header", header)]
        return podman("exec", self.head, "wget", "-qSO-", *words, "http://127.0.0.1:8265/api/jobs/", check=False)

    def submit(self, job_id: str) -> str:
        """Starts the submitter that shares the head's pod; returns its container's name."""
        container = self.head_group["template"]["spec"]["containers"][0]
        command = f'until python -c "{_HEALTHY}" >/dev/null 2>&1 ; do sleep 2 ; done ; '
        command += "ray job submit --address http://127.0.0.1:8265 "
        command += f"--submission-id {job_id} -- {self.job['spec']['entrypoint']} ;"
        name = f"{self.name}-submitter-{job_id}"
        self.node.running.append(name)
        words = ["run", "-d", "--name", name, "--network", f"container:{self.head}", *limited(SUBMITTER)]
        env = {"RAY_DASHBOARD_ADDRESS": "127.0.0.1:8265", **self.env}
        words += [word for key, value in env.items() for word in ("-e", f"{key}={value}")]
        podman(*words, container["image"], "/bin/bash", "-ce", "--", command)
        return name

    def lose(self) -> None:
        """The head dies at once; the operator removes the worker with it."""
        self.node.kill(self.head)
        self.node.kill(self.worker)

    def peaks(self) -> dict[str, float]:
        """The most memory that head and worker have held so far, in GiB, by what the kernel counted."""
        read = ["cat", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes", "/sys/fs/cgroup/memory.peak"]
        held = {}
        for kind, full in (("head", self.head), ("worker", self.worker)):
            numbers = [int(word) for word in podman("exec", full, *read, check=False).split() if word.isdigit()]
            held[kind] = max(numbers, default=0) / 2**30
        return held


def ended(container: str, timeout: float) -> tuple[int, str]:
    """Waits for a container's end; returns its exit status and what it said.

    Raises:
        TimeoutError: it goes on.
    """
    wait_for(
        lambda: podman("inspect", container, "--format", "{{.State.Status}}").strip() == "exited", container, timeout
    )
    status = int(podman("inspect", container, "--format", "{{.State.ExitCode}}"))
    return status, podman("logs", container)


def wait_for(ready: Callable[[], Any], what: str, seconds: float = 300.0, pause: float = 1.0) -> None:
    """Waits until something is true.

    Raises:
        TimeoutError: it was not, for so long.
    """
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} ({seconds:.0f} s)")
        time.sleep(pause)
