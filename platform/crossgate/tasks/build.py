"""The task that a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crossgate.config import Recipe
from crossgate.errors import UserError, nearest
from crossgate.tasks.finetune import FinetuneTask
from crossgate.tasks.pretrain import PretrainTask
from crossgate.tasks.task import Task


def build_task(
    recipe: Recipe,
    vocabularies: Mapping[str, Sequence[str]],
    class_counts: Mapping[str, Sequence[int]] | None = None,
) -> Task:
    """Returns the task of a recipe, its weights drawn from `run.seed` or loaded from `finetune.init`.

    Args:
        recipe: `kind` pretrain gives contrast; anything else, supervised training.
        vocabularies: the index's label task -> class names.
        class_counts: label task -> training clips of each class, for `finetune.balance`.

    Raises:
        UserError: for a label task that the index lacks, or a model that cannot be built.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had been built
        torch.manual_seed(recipe.run.seed)
        if recipe.kind == "pretrain":
            return PretrainTask(recipe)
        classes = _classes(recipe, vocabularies)
        weights = _balanced(recipe, class_counts) if recipe.finetune.balance else None
        return FinetuneTask(recipe, classes, weights)


def _classes(recipe: Recipe, vocabularies: Mapping[str, Sequence[str]]) -> Sequence[str]:
    task = recipe.finetune.task
    if task not in vocabularies:
        raise UserError(
            f"the index has no labels '{task}'",
            where="finetune.task",
            cure=nearest(task, vocabularies) if vocabularies else "pack a manifest with a label column",
        )
    classes = vocabularies[task]
    if len(classes) < 2:
        raise UserError(f"labels '{task}' have {len(classes)} class", where="finetune.task", expected="two or more")
    return classes


def _balanced(recipe: Recipe, class_counts: Mapping[str, Sequence[int]] | None) -> Tensor:
    """Inverse frequencies, scaled so that a clip counts 1 on average; a class without clips counts 0."""
    if class_counts is None:
        raise UserError("class counts are unknown here", where="finetune.balance", cure="set it to false")
    counts = torch.tensor(class_counts[recipe.finetune.task], dtype=torch.float32)
    weights = counts.sum() / (counts > 0).sum() / counts.clamp(min=1)
    return weights.masked_fill(counts == 0, 0)
