"""A pretraining run: contrast, then what the frozen features are worth against random ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from crossgate.config import Recipe
from crossgate.evaluation import Evaluation, Predictions, evaluate_pretrain, retrieval_scores
from crossgate.model.store import ModelCard, save_model
from crossgate.recipe import recipe_digest
from crossgate.runs.context import Part, RunContext, open_run
from crossgate.runs.predictions import predict_splits
from crossgate.tasks import build_task
from crossgate.tasks.task import Task
from crossgate.training.loop import Selection, fit

_LOOKED_THROUGH = 64  # shards of a split
NEEDED: tuple[Part, ...] = ("train",)
UNMEASURED = (
    "There is no test split (data.test is empty): the model is trained, and nothing was measured on test clips."
)


def run(recipe: Recipe) -> dict[str, float]:
    """Trains and measures; every rank calls it, rank 0 returns the metrics.

    Raises:
        UserError: for an index, a recipe or a machine that cannot do it.
    """
    with open_run(recipe, required=NEEDED) as context:
        task = build_task(recipe, context.index.vocabularies)
        selects = recipe.data.val and recipe.pretrain.contrast  # without contrast, retrieval would choose by chance
        result = fit(
            task,
            context.training_loader(),
            recipe,
            context.directory,
            context.world,
            tracker=context.tracker,
            validate=(lambda task, step: _validate(task, context)) if selects else None,
            selection=Selection("val/retrieval/mean/r_at_1", "higher"),
            save_model=lambda task, folder: save_model(folder, task.model, _card(context)),
        )
        done = measure(task, context)
        if done is None:
            return {}
        context.publish(done, f"Pretraining: {context.directory.name}", result.step)
        context.tracker.log_artifact(result.model_dir, "model")
        return done.metrics


def _validate(task: Task, context: RunContext) -> dict[str, float]:
    config = context.recipe.evaluation
    val = predict_splits(task, context, "val", config.gallery)
    return retrieval_scores(val, config, context.recipe.run.seed) if val else {}


def measure(task: Task, context: RunContext) -> Evaluation | None:
    """Measures frozen features of the trained and of an untrained network; None on ranks above 0."""
    if not context.recipe.data.test:
        return Evaluation(summary=UNMEASURED) if context.world.leads else None
    context = _without_unlabelled(context)
    recipe = context.recipe
    trained = _splits(task, context)
    random = None
    if recipe.evaluation.random_baseline and recipe.evaluation.probe:
        random = _splits(_untrained(context), context)
    if trained is None:
        return None
    train, val, test = trained
    return evaluate_pretrain(
        train, val, test, context.index.vocabularies, recipe.evaluation, random, seed=recipe.run.seed
    )


def _without_unlabelled(context: RunContext) -> RunContext:
    """Probes learn from labels: splits without any need not be encoded. Only small ones are looked through."""
    index, data = context.index, context.recipe.data
    train = tuple(
        name
        for name in data.train
        if len(index.select([name]).shards) > _LOOKED_THROUGH or any(map(sum, index.class_counts([name]).values()))
    )
    if not train:
        return context
    recipe = context.recipe.model_copy(update={"data": data.model_copy(update={"train": train})})
    return replace(context, recipe=recipe)


def _untrained(context: RunContext) -> Task:
    """The same network with random weights, downloaded ones not counting as such."""
    recipe = context.recipe.model_copy(update={"kind": "pretrain", "model": context.recipe.model.from_scratch()})
    return build_task(recipe, context.index.vocabularies).to(context.world.device)


def _splits(task: Task, context: RunContext) -> tuple[Predictions, Predictions, Predictions] | None:
    limit = context.recipe.evaluation.clips
    train, test = (predict_splits(task, context, part, limit) for part in ("train", "test"))
    val = predict_splits(task, context, "val", limit) if context.splits("val") else None
    if train is None or test is None:
        return None
    return train, train.select(np.arange(0)) if val is None else val, test


def _card(context: RunContext) -> ModelCard:
    recipe = context.recipe
    return ModelCard(
        kind="contrastive",
        model=recipe.model,
        clip=recipe.data.clip,
        provenance={key: str(value) for key, value in context.provenance().items()}
        | {"recipe_digest": recipe_digest(recipe)},
    )
