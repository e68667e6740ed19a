"""Writes an overlay of k8s/ as plain Kustomize input, and says what would change before it does."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crossgate.config import Recipe
from crossgate.deploy.recipes import TRAINED, recipe_text
from crossgate.deploy.settings import DeployConfig
from crossgate.errors import UserError, writing
from crossgate.recipe import parse_recipe

Tree = dict[str, Any]
JOBS = (*TRAINED, "release")
_WORKER = "/spec/rayClusterSpec/workerGroupSpecs/0"
_SERVER = "/spec/template/spec/containers/0/env"
_MODEL = "models:/crossgate-action@champion"  # as the job release registers it


@dataclass(frozen=True)
class Overlay:
    """The files of an overlay.

    Attributes:
        folder: where they belong.
        files: path in the folder -> content.
    """

    folder: Path
    files: dict[str, str]

    def diff(self) -> str:
        """Returns what writing would change, as a unified diff; empty where nothing would."""
        lines: list[str] = []
        for name, content in self.files.items():
            path = self.folder / name
            old = path.read_text() if path.exists() else ""
            lines += difflib.unified_diff(
                old.splitlines(keepends=True),
                content.splitlines(keepends=True),
                str(path) if old else os.devnull,
                str(path),
            )
        return "".join(lines)

    def trainings(self) -> Iterator[tuple[str, Recipe]]:
        """Yields the jobs that train with their recipes, free of shards and weights, which may be out of reach here."""
        for job in TRAINED:
            recipe = parse_recipe(yaml.safe_load(self.files[f"jobs/{job}.yaml"]), where=job)
            if recipe.kind != "evaluate":
                recipe.data.index = recipe.finetune.init = ""
                yield job, recipe

    def write(self) -> None:
        """Writes the files.

        Raises:
            UserError: for a folder that cannot be written.
        """
        for name, content in self.files.items():
            path = self.folder / name
            with writing("the overlay", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)


def build(settings: DeployConfig, manifests: str | Path, beside: str | Path = ".") -> Overlay:
    """Returns the overlay of a cluster.

    Args:
        settings: of the cluster.
        manifests: the folder k8s of a clone.
        beside: folder that `recipe` of the settings starts at.

    Raises:
        UserError: no manifests there, or something that cannot work on these nodes.
    """
    manifests = Path(manifests)
    if not (manifests / "base" / "kustomization.yaml").exists():
        raise UserError("no manifests", where=manifests, cure="run it in a clone, or give --manifests")
    _refuse_beyond_quota(settings, manifests / "cluster-admin" / "kueue.yaml")
    recipes = {job: recipe_text(job, settings, manifests, Path(beside)) for job in TRAINED}
    trees = {"": _platform(settings), "jobs/": _jobs(settings), "raycluster/": _raycluster(settings)}
    if settings.serving_image:
        trees["serving/"] = _kustomization(settings, 4, ["serving"], [])
    files = {f"{part}kustomization.yaml": _dump(tree) for part, tree in trees.items()}
    files |= {f"jobs/{job}.yaml": text for job, text in recipes.items()}
    return Overlay(manifests / "overlays" / settings.name, files)


def _refuse_beyond_quota(settings: DeployConfig, queues: Path) -> None:
    """A job that asks for more than its queue may ever give waits for ever."""
    quota = 0
    for tree in yaml.safe_load_all(queues.read_text()) if queues.exists() else ():
        for group in tree.get("spec", {}).get("resourceGroups", ()):
            for flavor in group["flavors"]:
                quota += sum(int(r["nominalQuota"]) for r in flavor["resources"] if r["name"] == "nvidia.com/gpu")
    if quota and settings.ranks > quota:
        raise UserError(
            f"{settings.ranks} GPUs are wanted, the queue's quota is {quota}", where=queues, cure="raise nominalQuota"
        )


def _kustomization(settings: DeployConfig, depth: int, resources: list[str], components: list[str]) -> Tree:
    up = "../" * (depth - 1)
    tree: Tree = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "crossgate",
        "resources": [up + name for name in resources],
    }
    if components:
        tree["components"] = [f"{up}components/{name}" for name in components]
    tree["images"] = [_image("crossgate", settings.image)]
    if settings.serving_image:
        tree["images"].append(_image("crossgate-serving", settings.serving_image))
    return tree


def _identity(settings: DeployConfig) -> str:
    return "workload-identity" if settings.role_arn else "s3-static"


def _platform(settings: DeployConfig) -> Tree:
    components = ["object-storage", _identity(settings), "kueue-queue", "monitoring"]
    tree = _kustomization(settings, 3, ["base", "base/mlflow"], components)
    claim: list[Tree] = [_replace("/spec/resources/requests/storage", f"{settings.runs_gib}Gi")]
    if settings.runs_storage_class:
        claim.append({"op": "add", "path": "/spec/storageClassName", "value": settings.runs_storage_class})
    patches = [_patch({"kind": "PersistentVolumeClaim", "name": "runs"}, claim)]
    if settings.artifacts:
        patches.append(
            _patch(
                {"kind": "Deployment", "name": "mlflow"},
                [
                    {"op": "test", "path": f"{_SERVER}/1/name", "value": "MLFLOW_ARTIFACTS_DESTINATION"},
                    _replace(f"{_SERVER}/1/value", settings.artifacts),
                ],
            )
        )
    if settings.endpoint:
        address = {"name": "AWS_ENDPOINT_URL", "value": settings.endpoint}
        patches.append(
            _patch({"kind": "Deployment", "name": "mlflow"}, [{"op": "add", "path": f"{_SERVER}/-", "value": address}])
        )
        tree["configMapGenerator"] = [
            {"name": "crossgate-settings", "behavior": "merge", "literals": [f"AWS_ENDPOINT_URL={settings.endpoint}"]}
        ]
        tree["generatorOptions"] = {"disableNameSuffixHash": True}
        patches.append(_way_out(*settings.endpoint_at))
    tree["patches"] = patches + _role(settings, "trainer|mlflow")
    return tree


def _way_out(host: str, port: int) -> Tree:
    """Lets pods reach the endpoint through the component's policy, which opens HTTPS to addresses outside only."""
    _, *domain = host.split(".")
    operations: list[Tree] = [{"op": "test", "path": "/spec/egress/0/ports/0/port", "value": 443}]
    if port != 443:
        operations.append({"op": "add", "path": "/spec/egress/0/ports/-", "value": {"protocol": "TCP", "port": port}})
    if len(domain) == 1 or domain[1:2] == ["svc"]:  # SERVICE.NAMESPACE: an address range need not hold a cluster's pods
        names = {"matchLabels": {"kubernetes.io/metadata.name": domain[0]}}
        operations.append({"op": "add", "path": "/spec/egress/0/to/-", "value": {"namespaceSelector": names}})
    return _patch({"kind": "NetworkPolicy", "name": "object-storage"}, operations)


def _jobs(settings: DeployConfig) -> Tree:
    components = ["gpu", "kueue", *([] if settings.role_arn else ["s3-static"]), *(["spot"] if settings.spot else [])]
    jobs = [*JOBS, *(["predict"] if settings.videos else [])]
    tree = _kustomization(settings, 4, [f"jobs/{job}" for job in jobs], components)
    tree["generatorOptions"] = {"disableNameSuffixHash": True}
    tree["configMapGenerator"] = [
        {"name": f"recipe-{job}", "behavior": "replace", "files": [f"{job}.yaml"]} for job in TRAINED
    ]
    size = {
        "cpu": str(settings.cpus_per_node),
        "memory": f"{settings.memory_gib_per_node}Gi",
        "ephemeral-storage": "100Gi",
        "nvidia.com/gpu": str(settings.gpus_per_node),
    }
    operations: list[Tree] = [{"op": "test", "path": f"{_WORKER}/groupName", "value": "workers"}]
    operations += [_replace(f"{_WORKER}/{key}", settings.nodes) for key in ("replicas", "minReplicas", "maxReplicas")]
    operations.append(
        _replace(f"{_WORKER}/template/spec/containers/0/resources", {"requests": dict(size), "limits": dict(size)})
    )
    tree["patches"] = [_patch({"kind": "RayJob", "name": "pretrain"}, operations)]
    if settings.videos:
        command = f"python /app/jobs/predict.py {_MODEL} {settings.videos} --out {settings.scores}"
        tree["patches"].append(_patch({"kind": "RayJob", "name": "predict"}, [_replace("/spec/entrypoint", command)]))
    return tree


def _raycluster(settings: DeployConfig) -> Tree:
    tree = _kustomization(settings, 4, ["raycluster"], ["gpu", _identity(settings)])
    operations = [_replace("/spec/workerGroupSpecs/0/maxReplicas", settings.ranks)]
    tree["patches"] = [_patch({"kind": "RayCluster"}, operations), *_role(settings, "ray-head")]
    return tree


def _role(settings: DeployConfig, accounts: str) -> list[Tree]:
    """The cloud role of accounts, over the component's placeholder."""
    if not settings.role_arn:
        return []
    annotation = _replace("/metadata/annotations/eks.amazonaws.com~1role-arn", settings.role_arn)
    return [_patch({"kind": "ServiceAccount", "name": accounts}, [annotation])]


def _image(name: str, image: str) -> Tree:
    place, _, digest = image.partition("@")
    head, _, last = place.rpartition("/")
    last, _, tag = last.partition(":")
    place = f"{head}/{last}" if head else last
    return {"name": name, "newName": place, **({"digest": digest} if digest else {"newTag": tag})}


def _replace(path: str, value: Any) -> Tree:
    return {"op": "replace", "path": path, "value": value}


def _patch(target: Tree, operations: list[Tree]) -> Tree:
    return {"target": target, "patch": yaml.safe_dump(operations, sort_keys=False)}


class _Dumper(yaml.SafeDumper):
    """Writes patches as the blocks that people write."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _dump(tree: Tree) -> str:
    return "# Made by `crossgate deploy`; change its settings and make it again.\n" + yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, width=1000
    )
