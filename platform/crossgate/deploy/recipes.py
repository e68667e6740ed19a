"""The jobs' recipes for one cluster: read from k8s/jobs, made to fit, refused where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from crossgate.config import Recipe
from crossgate.deploy.settings import DeployConfig
from crossgate.errors import UserError
from crossgate.recipe import load_recipe

TRAINED = ("pretrain", "finetune", "search", "evaluate")
"""Jobs with a recipe."""
_UPLOADED = ("pretrain", "finetune")
"""Those whose checkpoints are worth a place outside; a search's trials are short."""
_RUNS = "/runs"


def recipe_text(job: str, settings: DeployConfig, manifests: Path, beside: Path) -> str:
    """Returns the recipe of a job as YAML.

    Args:
        job: one of `TRAINED`.
        settings: of the cluster.
        manifests: the folder k8s.
        beside: folder that `recipe` of the settings starts at.

    Raises:
        UserError: for a recipe that is not valid, or that these nodes cannot run.
    """
    own = job == "pretrain" and settings.recipe
    path = beside / settings.recipe if own else manifests / "jobs" / job / f"{job}.yaml"
    overrides = [f"data.index={settings.shards}", f"run.output={_RUNS}", "cluster.launcher=ray"]
    if job in _UPLOADED:
        overrides.append(f"training.checkpoint_url={json.dumps(settings.checkpoints)}")
    name = load_recipe(path).run.name  # of its own settings, as long as nobody chose one
    _refuse_batch(path, settings if job == "pretrain" else None)
    if job == "pretrain":
        overrides += [f"cluster.workers={settings.ranks}", "cluster.gpus_per_worker=1"]
    recipe = load_recipe(path, overrides)
    if recipe.kind != job:
        raise UserError(f"a recipe of kind '{recipe.kind}'", where=path, expected=f"kind '{job}'")
    if job == "pretrain":
        _refuse_misfit(recipe, settings, path)
    if settings.spot and job != "evaluate":  # which trains nothing
        _refuse_rare_checkpoints(recipe, path)
    return _dump(path, overrides, name)


def _refuse_batch(path: Path, settings: DeployConfig | None) -> None:
    """Says which global batches would do before the recipe itself only says that this one does not."""
    if settings is None:
        return
    recipe = load_recipe(path)
    step = settings.ranks * recipe.engine.accumulation
    batch = recipe.data.global_batch
    if batch % step:
        lower, upper = batch // step * step, -(-batch // step) * step
        choices = " or ".join(str(size) for size in (lower, upper) if size)
        raise UserError(
            f"data.global_batch {batch} does not divide over {settings.nodes} nodes of {settings.gpus_per_node} GPUs",
            where=path,
            cure=f"make it {choices}, or change nodes",
        )


def _refuse_misfit(recipe: Recipe, settings: DeployConfig, path: Path) -> None:
    wanted = recipe.cluster.cpus_per_worker * settings.gpus_per_node
    if wanted > settings.cpus_per_node:
        raise UserError(
            f"{settings.gpus_per_node} ranks a node want {wanted:g} CPUs, the node gives {settings.cpus_per_node}",
            where=path,
            cure=f"set cluster.cpus_per_worker to {settings.cpus_per_node // settings.gpus_per_node} or less",
        )


def _refuse_rare_checkpoints(recipe: Recipe, path: Path) -> None:
    if not (recipe.training.save_every or recipe.training.save_minutes):
        raise UserError(
            "spot nodes and a checkpoint at each epoch's end only",
            where=path,
            cure="set training.save_minutes: a lost node costs that much work",
        )


def _dump(path: Path, overrides: list[str], name: str) -> str:
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    for override in [*overrides, f"run.name={name}"]:
        key, _, value = override.partition("=")
        section, _, last = key.partition(".")
        tree.setdefault(section, {})[last] = yaml.safe_load(value)
    head = f"# Made by `crossgate deploy` from {path.name}; change that one and make it again.\n"
    return head + yaml.safe_dump(tree, sort_keys=False)
