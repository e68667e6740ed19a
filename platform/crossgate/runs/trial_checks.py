"""What every trial of a search would stumble over, found before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crossgate.config import Recipe
from crossgate.errors import UserError, nearest
from crossgate.evaluation import Predictions, classifier_scores
from crossgate.model.fusion import check_name
from crossgate.model.store import model_directory, read_card
from crossgate.runs.context import check_labels, check_splits, check_task
from crossgate.runs.fusions import GATE
from crossgate.stream.index import Index


def check_trials(recipe: Recipe, index: Index) -> None:
    """Checks splits, task, model to start from, names of fusions and the metric; not what the space itself varies.

    Raises:
        UserError: naming the recipe's key.
    """
    space, task = recipe.search.space, recipe.finetune.task
    if not space.keys() & {"data.train", "data.val"}:
        check_splits(index, recipe, ("train", "val"), ("train", "val"))
    if recipe.finetune.init and "finetune.init" not in space:
        read_card(model_directory(recipe.finetune.init))
    varied = space.get(GATE, [recipe.model.fusion.name])
    for name in varied if isinstance(varied, list) else getattr(varied, "values", []):
        check_name(str(name), f"search.space.{GATE}" if GATE in space else GATE)
    if "finetune.task" in space:
        return
    check_task(index, task)
    check_labels(index, recipe, "val")
    measured = measures(recipe, index.vocabularies[task])
    if recipe.search.metric.startswith("val/") and recipe.search.metric not in measured:
        raise UserError(
            f"trials do not measure '{recipe.search.metric}'",
            where="search.metric",
            cure=f"{nearest(recipe.search.metric, measured)}; there are {', '.join(measured)}",
        )


def measures(recipe: Recipe, classes: Sequence[str]) -> list[str]:
    """Returns the names of what a trial measures on validation: those of made-up answers to clips of every class."""
    names, count = recipe.data.clip.modalities, 2 * len(classes)
    shape = (count, len(names))
    made_up = Predictions(
        modalities=names,
        features=np.zeros((*shape, 1)),
        embeddings=None,
        fused=np.zeros((count, 1)),
        weights=None,
        logits=np.zeros((count, len(classes))),
        unimodal_logits=np.zeros((*shape, len(classes))),
        present=np.ones(shape, bool),
        group=np.arange(count),
        labels={recipe.finetune.task: np.arange(count) % len(classes)},
        degraded=np.zeros(shape),
        keys=[str(number) for number in range(count)],
    )
    return sorted(
        classifier_scores(made_up, recipe.finetune.task, classes, recipe.finetune.positive, recipe.evaluation)
    )
