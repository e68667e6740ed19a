"""Rules that hold manifests, command line, recipes and versions together. Each returns complaints."""

from __future__ import annotations

import ast
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer
from manifests import ROOT, Object, containers, named, pods, quantity, ray_cluster

from crossgate import __version__
from crossgate.cli import app
from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.recipe import load_recipe

_IN_IMAGE = "/app/"
# Typer carries a click of its own beside the one that MLflow uses.
REFUSALS = (click.ClickException, typer.BadParameter.__mro__[2], UserError, OSError)
SUBMITTER = {"cpu": 0.5, "memory": 200 * 2**20}
"""What KubeRay's submitter container asks for beside the head."""


def agreement(found: list[Object]) -> list[str]:
    """All rules over all objects."""
    rules = (commands, recipes, versions, reachability, quotas)
    return [complaint for rule in rules for complaint in rule(found)]


def commands(found: list[Object]) -> Iterator[str]:
    """Every command line is one that the real command takes, and names what is mounted."""
    for thing in found:
        if thing["kind"] == "RayJob":
            yield from _command(named(thing), thing["spec"]["entrypoint"].split())
        for path, _, pod in pods(thing):
            for container in containers(pod):
                words = [*container.get("command", ()), *container.get("args", ())]
                if words:
                    yield from _command(f"{named(thing)}{path} container {container['name']}", words)


def _command(where: str, words: list[str]) -> Iterator[str]:
    try:
        parse(*words)
    except REFUSALS as error:
        reason = error.format_message() if hasattr(error, "format_message") else str(error)
        yield f"{where}: the command line refuses it: {reason}"


@functools.cache
def parse(*words: str) -> tuple[str, dict[str, Any]]:
    """Returns the subcommand and its parsed parameters; runs nothing.

    Raises:
        ClickException: click's or Typer's, as the real command would.
        UserError: for a program that is not in the image.
    """
    program, *arguments = words
    if program == "mlflow":
        import mlflow.cli

        return _descend(mlflow.cli.cli, arguments)
    if program == "python" and arguments and arguments[0].startswith(_IN_IMAGE):
        script = ROOT / arguments[0].removeprefix(_IN_IMAGE)
        arguments = [*_words_of(script), *arguments[1:]]
    elif program != "crossgate":
        raise UserError("not a program of the image", where=program)
    return _descend(_crossgate(), arguments)


@functools.cache
def _crossgate() -> Any:
    return typer.main.get_command(app)


def _descend(command: Any, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    context = command.make_context(command.name, list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context.info_name or "", context.params


def _words_of(script: Path) -> list[str]:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_job":
            return [ast.literal_eval(word) for word in node.args]
    raise UserError("does not call run_job", where=script)


def recipe_of(job: Object, found: list[Object]) -> Recipe | None:
    """Returns the recipe that a job's head mounts, loaded as the job will load it; None for a job without.

    Raises:
        UserError: for a recipe that is not mounted, or that the configuration refuses.
    """
    kind, parameters = parse(*job["spec"]["entrypoint"].split())
    if "config" not in parameters:
        return None
    path = Path(parameters["config"])
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    config_map = volumes.get(mounts.get(str(path.parent), ""), {}).get("configMap", {}).get("name")
    content = next(
        (
            thing["data"].get(path.name)
            for thing in found
            if thing["kind"] == "ConfigMap" and thing["metadata"]["name"] == config_map
        ),
        None,
    )
    if content is None:
        raise UserError("no such recipe is mounted", where=path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_text(content)
        recipe = load_recipe(file, parameters.get("overrides") or ())
    if recipe.kind != kind:
        raise UserError(f"a recipe of kind {recipe.kind} for `crossgate {kind}`", where=path)
    return recipe


def recipes(found: list[Object]) -> Iterator[str]:
    """Every mounted recipe loads, fits the job's pods and writes where it is kept."""
    for thing in found:
        if thing["kind"] != "RayJob":
            continue
        try:
            recipe = recipe_of(thing, found)
        except REFUSALS as error:
            yield f"{named(thing)}: its recipe: {error}"
            continue
        if recipe is not None:
            yield from (f"{named(thing)}: {complaint}" for complaint in _fits(thing, recipe))


def _fits(job: Object, recipe: Recipe) -> Iterator[str]:
    cluster = job["spec"]["rayClusterSpec"]
    claims = {"runs"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        kept = {v["name"] for v in pod["volumes"] if v.get("persistentVolumeClaim", {}).get("claimName") in claims}
        mounted = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] in kept}
        if recipe.run.output not in mounted:
            yield f"runs go to {recipe.run.output}, which no shared volume holds"
    seats = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for group in cluster["workerGroupSpecs"]:
        for name in seats:
            limit = group["template"]["spec"]["containers"][0]["resources"]["limits"].get(name, 0)
            seats[name] += group["replicas"] * quantity(limit)
    ranks = recipe.cluster.workers if recipe.kind != "search" else recipe.search.concurrent
    searching = recipe.kind == "search"
    per_rank = {
        "cpu": recipe.search.cpus_per_trial if searching else recipe.cluster.cpus_per_worker,
        "nvidia.com/gpu": recipe.search.gpus_per_trial if searching else recipe.cluster.gpus_per_worker,
    }
    if ranks * per_rank["cpu"] > seats["cpu"]:
        yield f"{ranks} ranks want {ranks * per_rank['cpu']:g} CPUs, its workers have {seats['cpu']:g}"
    wanted, gpus = ranks * per_rank["nvidia.com/gpu"], seats["nvidia.com/gpu"]
    if wanted != gpus:
        yield f"{ranks} ranks want {wanted:g} GPUs, its workers have {gpus:g}"
    if not searching and recipe.cluster.launcher != "ray":
        yield "it would run on the head: cluster.launcher is not ray"
    if not recipe.run.name:
        yield "its run has no name of its own"


def pinned() -> dict[str, str]:
    """The tested versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}


def stated() -> dict[str, str]:
    """The versions of k8s/versions.env."""
    lines = (ROOT / "k8s" / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def versions(found: list[Object]) -> Iterator[str]:
    """Ray's version is the tested one, our images carry ours, the API groups are the current ones."""
    current = {"ray.io": "v1", "kueue.x-k8s.io": "v1beta2"}
    for thing in found:
        group, _, version = thing["apiVersion"].rpartition("/")
        if version != current.get(group, version):
            yield f"{named(thing)}: {thing['apiVersion']} is not {group}/{current[group]}"
        cluster = ray_cluster(thing)
        if cluster and cluster.get("rayVersion") != pinned()["ray"]:
            yield f"{named(thing)}: Ray {cluster.get('rayVersion')}, tested is {pinned()['ray']}"
        for path, _, pod in pods(thing):
            for container in containers(pod):
                name, _, tag = container["image"].rpartition("/")[2].partition("@")[0].partition(":")
                if name in ("crossgate", "crossgate-serving") and tag not in ("", __version__):
                    yield f"{named(thing)}{path}: image {container['image']}, the package is {__version__}"


def reachability(found: list[Object]) -> Iterator[str]:
    """Addresses lead to Services of the set, through doors that the network policies leave open."""
    services = {
        f"http://{thing['metadata']['name']}:{port['port']}"
        for thing in found
        if thing["kind"] == "Service"
        for port in thing["spec"]["ports"]
    }
    named_uris = [
        (named(thing), value)
        for thing in found
        if thing["kind"] == "ConfigMap"
        for key, value in (thing.get("data") or {}).items()
        if key == "MLFLOW_TRACKING_URI"
    ]
    for thing in found:
        for _, _, pod in pods(thing):
            for container in containers(pod):
                for entry in container.get("env", ()):
                    if entry["name"] == "MLFLOW_TRACKING_URI":
                        named_uris.append((named(thing), entry["value"]))
                hosts = [w for w in container.get("command", ()) if w.startswith("--allowed-hosts=")]
                if thing["metadata"]["name"] == "mlflow" and "mlflow:5000" not in ",".join(hosts).replace(
                    "=", ","
                ).split(","):
                    yield f"{named(thing)}: answers 403 to mlflow:5000"
    for where, uri in named_uris:
        if uri not in services:
            yield f"{where}: {uri} is no Service of the set"
    names = {thing["metadata"]["name"] for thing in found if thing["kind"] == "NetworkPolicy"}
    for needed in ("allow-dns", "ray-nodes", "ray-dashboard", "ray-to-mlflow", "mlflow"):
        if needed not in names:
            yield f"NetworkPolicy {needed} is gone: nothing would work behind default-deny"


def quotas(found: list[Object]) -> Iterator[str]:
    """A job in a queue asks for nothing that the queue does not cover; it would wait for ever."""
    covered = {
        name
        for thing in found
        if thing["kind"] == "ClusterQueue"
        for group in thing["spec"]["resourceGroups"]
        for name in group["coveredResources"]
    }
    for thing in found:
        if "kueue.x-k8s.io/queue-name" not in thing["metadata"].get("labels", {}):
            continue
        for path, _, pod in pods(thing):
            for container in containers(pod):
                for name in sorted(set(container["resources"]["requests"]) - covered):
                    yield f"{named(thing)}{path}: its queue has no quota of {name}"


def asked(found: list[Object]) -> dict[str, float]:
    """CPUs and bytes of memory that all pods of a set ask for together, the submitters of jobs too."""
    total = {"cpu": 0.0, "memory": 0.0}
    for thing in found:
        for path, owner, pod in pods(thing):
            replicas = owner.get("replicas", 1) if "headGroupSpec" not in path else 1
            for name in total:
                steps = [quantity(c["resources"]["requests"][name]) for c in pod.get("initContainers", ())]
                together = sum(quantity(c["resources"]["requests"][name]) for c in pod["containers"])
                if thing["kind"] == "RayJob" and "headGroupSpec" in path:
                    together += SUBMITTER[name]
                total[name] += replicas * max(together, *steps, 0)
    return total
