"""Pods of the manifests as podman containers: their images, users, mounts, environment and limits, on one network."""

from __future__ import annotations

import contextlib
import copy
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from manifests import Object, named, quantity


def podman(*words: str, check: bool = True, timeout: float = 300) -> str:
    """Runs podman; returns what it said on both streams.

    Raises:
        RuntimeError: podman or the container's command has failed, and `check` is on.
    """
    done = subprocess.run(
        ["podman", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    if check and done.returncode:
        raise RuntimeError(f"podman {shlex.join(words)}\n{done.stdout[-4000:]}")
    return done.stdout


def missing(image: str) -> str:
    """Why containers of an image cannot run here; empty where they can."""
    if not shutil.which("podman"):
        return "no podman on this machine"
    if subprocess.run(["podman", "image", "exists", image], capture_output=True).returncode:
        return f"{image} has not been built on this machine"
    return ""


class Node:
    """One machine of a cluster: its network, its volumes, the pods that run on it.

    Args:
        folder: for volumes.
        things: the rendered objects that are applied.
    """

    def __init__(self, folder: Path, things: list[Object]) -> None:
        self.folder, self.things = folder, {named(thing): thing for thing in things}
        self.tag = uuid.uuid4().hex[:8]
        self.network = f"crossgate-{self.tag}"
        self.hosts: dict[str, str] = {}
        """Services: name -> address."""
        self.running: list[str] = []
        self.pods: list[str] = []
        self.claims: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def up(cls, folder: Path, things: list[Object]) -> Iterator[Node]:
        """A node that is gone afterwards with all that ran on it."""
        node = cls(folder, things)
        folder.chmod(0o755)
        podman("network", "create", node.network)
        try:
            yield node
        finally:
            for name in reversed(list(node.running)):
                node.kill(name)
            podman("pod", "rm", "-f", "-t", "0", *node.pods, check=False)
            podman("volume", "rm", "-f", *node.claims, check=False)
            podman("network", "rm", "-f", node.network, check=False)

    @property
    def gateway(self) -> str:
        """This machine's own address on the network."""
        return podman("network", "inspect", self.network, "--format", "{{(index .Subnets 0).Gateway}}").strip()

    # ---- a pod's containers ------------------------------------------------------------------------------------

    def run(self, name: str, pod: Object, container: Object, command: list[str], **how: Any) -> str:
        """Runs a container of a pod to its end; returns what it said."""
        full = f"{name}-{uuid.uuid4().hex[:8]}"
        words = self._words(name, pod, container, **how)
        self.running.append(full)
        try:
            return podman("run", "--name", full, *words, container["image"], *command, timeout=1200)
        finally:
            self.kill(full)

    def start(self, name: str, pod: Object, container: Object, command: list[str], **how: Any) -> str:
        """Starts a container of a pod that stays; returns its full name."""
        full = f"{name}-{self.tag}"
        words = self._words(name, pod, container, **how)
        self.running.append(full)
        podman("run", "-d", "--name", full, *words, container["image"], *command)
        self.hosts[name] = _address(full)
        return full

    def kill(self, full: str) -> None:
        """Kills a container at once, as a lost node does."""
        podman("rm", "-f", "-t", "0", full, check=False)
        self.running.remove(full)

    def _words(self, name: str, pod: Object, container: Object, env: Mapping[str, str] | None = None) -> list[str]:
        context = pod["securityContext"] | container["securityContext"]
        limits = container["resources"]["limits"]
        words = ["--network", self.network, "--user", f"{context['runAsUser']}:{context['runAsGroup']}"]
        words += [f"--cap-drop={capability}" for capability in context["capabilities"]["drop"]]
        words += ["--security-opt=no-new-privileges"] * (not context["allowPrivilegeEscalation"])
        words += ["--read-only", "--read-only-tmpfs=false"] * context["readOnlyRootFilesystem"]
        words += limited(limits)
        for mount in container["volumeMounts"]:
            volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
            suffix = ":ro" if mount.get("readOnly") else ""
            words += ["-v", f"{self.volume(name, volume)}:{mount['mountPath']}{suffix}"]
        for host, address in self.hosts.items():
            words += ["--add-host", f"{host}:{address}"]
        values = {**self._environment(container), **(env or {})}
        return words + [word for key, value in values.items() for word in ("-e", f"{key}={value}")]

    def volume(self, pod: str, volume: Object) -> Path:
        """The folder behind a pod's volume: a claim is everybody's, an emptyDir the pod's own."""
        if "persistentVolumeClaim" in volume:
            path = self.folder / "claims" / volume["persistentVolumeClaim"]["claimName"]
        elif "configMap" in volume:
            path = self.folder / "configs" / volume["configMap"]["name"]
        else:
            path = self.folder / "scratch" / f"{pod}-{volume['name']}"
        path.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            for key, text in self.things[f"ConfigMap/{path.name}"]["data"].items():
                (path / key).write_text(text)
        else:
            path.chmod(0o777)  # as fsGroup does
        return path

    def _environment(self, container: Object) -> dict[str, str]:
        values: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:  # an optional secret is simply not there
                values |= self.things[f"ConfigMap/{source['configMapRef']['name']}"]["data"]
        return values | {entry["name"]: entry["value"] for entry in container.get("env", ())}

    # ---- a Deployment ------------------------------------------------------------------------------------------

    def play(self, name: str) -> str:
        """Runs a Deployment of one replica, with its claims, by `podman kube play`; returns its pod's name.

        It is found by the Deployment's name. Names are made this node's own, since podman's are the whole machine's,
        and a claim gets the owner that fsGroup would give it.
        """
        deployment = copy.deepcopy(self.things[f"Deployment/{name}"])
        deployment["metadata"]["name"] = f"{name}-{self.tag}"
        spec = deployment["spec"]["template"]["spec"]
        owner = str(spec["securityContext"]["runAsUser"])
        documents = [deployment]
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                source = volume["persistentVolumeClaim"]
                claim = copy.deepcopy(self.things[f"PersistentVolumeClaim/{source['claimName']}"])
                source["claimName"] = claim["metadata"]["name"] = f"{source['claimName']}-{self.tag}"
                claim["metadata"]["annotations"] = {"volume.podman.io/uid": owner, "volume.podman.io/gid": owner}
                documents.insert(0, claim)
                self.claims.append(source["claimName"])
        for container in spec["containers"]:
            container.pop("ports")  # podman would take the same ones of this machine
        spec["hostAliases"] = [{"ip": address, "hostnames": [host]} for host, address in self.hosts.items()]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        self.pods.append(f"{deployment['metadata']['name']}-pod-0")
        podman("kube", "play", "--network", self.network, str(path))
        infra = podman("pod", "inspect", self.pods[-1], "--format", "{{.InfraContainerID}}").strip()
        self.hosts[name] = _address(infra)
        return self.pods[-1]


def _address(container: str) -> str:
    where = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return podman("inspect", container, "--format", where).strip()


def limited(limits: Mapping[str, str]) -> list[str]:
    """What the kubelet holds a container to; KubeRay mounts a /dev/shm as large as the memory."""
    memory = str(int(quantity(limits["memory"])))
    return ["--memory", memory, "--shm-size", memory, "--cpus", f"{quantity(limits['cpu']):g}"]
