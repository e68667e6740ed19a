"""Every command of docs/kubernetes.md is rendered, parsed by the real program, or about objects that exist."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
from agreement_rules import parse, stated
from manifests import K8S, ROOT, SETS, named, objects, objects_of, pods, rendered

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
OPERATORS = {
    "github.com/ray-project/kuberay/ray-operator/config/default": "KUBERAY",
    "github.com/kubernetes-sigs/kueue/config/default": "KUEUE",
}
MADE_BY_KUBERAY = {"service/interactive-head-svc", "secret/interactive"}  # of RayCluster/interactive


def test_the_page_shows_every_overlay_and_job() -> None:
    text = "\n".join(COMMANDS)
    for needed in ("overlays/local", "overlays/gpu", "cluster-admin", "raycluster", "serving", "crossgate deploy"):
        assert needed in text


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = shlex.split(command)
    check = {
        "podman": check_build,
        "kubectl": check_kubectl,
        "crossgate": lambda words: parse(*words),
        "ray": check_submission,
        "export": check_export,
    }[words[0]]
    check(words)


def check_build(words: list[str]) -> None:
    assert words[1] == "build" and (ROOT / words[-1]).is_dir()
    text = (ROOT / words[words.index("-f") + 1]).read_text()
    images = {
        container["image"]
        for thing in objects_of("gpu")
        for _, _, pod in pods(thing)
        for container in pod["containers"]
    }
    assert words[words.index("-t") + 1] in images
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split()), source


def check_kubectl(words: list[str]) -> None:
    words = [word for word in words if word != "--server-side"]
    if words[1] == "apply":
        check_apply(words)
        return
    assert words[1:3] == ["-n", "crossgate"], "the namespace is named"
    verb, rest = words[3], words[4:]
    known = {named(thing).lower() for name in SETS for thing in objects_of(name)} | MADE_BY_KUBERAY
    if verb == "create":
        assert rest[:2] == ["secret", "generic"]
        assert f"name: {rest[2]}" in (K8S / "secret.example.yaml").read_text()
    elif verb == "logs":
        assert rest[-1] == "ray-job-submitter" and any(thing["kind"] == "RayJob" for thing in objects_of("gpu"))
    else:
        assert verb in ("wait", "port-forward", "delete", "rollout")
        target = " ".join(rest).replace("rayjob pretrain", "rayjob/pretrain")
        assert any(name in target.split() for name in known), target


def check_apply(words: list[str]) -> None:
    folder = words[words.index("-k") + 1]
    if folder.startswith("github.com/"):
        place, _, ref = folder.partition("?ref=v")
        assert ref == stated()[OPERATORS[place]]
        return
    found = objects(rendered(str((ROOT / folder).relative_to(K8S))))
    if "-l" in words:
        key, _, value = words[words.index("-l") + 1].partition("=")
        kinds = {thing["kind"] for thing in found if thing["metadata"].get("labels", {}).get(key) == value}
        assert "RayJob" in kinds
        assert ("ConfigMap" in kinds) == (value not in ("release", "predict")), "its recipe comes along"


def check_submission(words: list[str]) -> None:
    program, script, *rest = words[words.index("--") + 1 :]
    kind, parameters = parse(program, f"/app/{script}", *rest)
    assert f"/{kind}.py" in script and (ROOT / parameters["config"]).exists()
    from crossgate.recipe import load_recipe

    assert load_recipe(ROOT / parameters["config"], parameters["overrides"]).kind == kind


def check_export(words: list[str]) -> None:
    name = words[1].partition("=")[0]
    assert name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def test_serving_image_holds_what_a_packaged_model_requires() -> None:
    tree = ast.parse((ROOT / "platform" / "crossgate" / "registry" / "package.py").read_text())
    required = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIREMENTS"
    )
    lines = (K8S / "image" / "serving-requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [*required, "mlflow"]


@pytest.mark.parametrize("name", ["Containerfile", "Containerfile.serving"])
def test_images_end_as_nobody_special_and_without_a_compiler(name: str) -> None:
    text = (K8S / "image" / name).read_text()
    final = text[text.rindex("\nFROM ") :]
    assert text.count("\nFROM ${BASE}") == 2 and "ARG BASE=" in text
    assert "\nUSER 1000:1000\n" in final and "\nHEALTHCHECK " in final
    assert not re.search(r"\b(gcc|g\+\+|build-essential|make)\b", final)
    assert "-c constraints.txt" in text or "-c /src/constraints.txt" in text
