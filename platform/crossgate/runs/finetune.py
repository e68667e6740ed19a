"""A fine-tuning run: a classifier on a pretrained network, selected on validation, measured once on test."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from crossgate.config import Recipe
from crossgate.evaluation import Evaluation, classifier_scores, evaluate_classifier
from crossgate.model.store import ModelCard, save_model
from crossgate.recipe import recipe_digest
from crossgate.runs.context import RunContext, open_run
from crossgate.runs.predictions import predict_splits
from crossgate.tasks import build_task
from crossgate.tasks.finetune import FinetuneTask
from crossgate.tasks.task import Task
from crossgate.training.loop import FitResult, Selection, fit

log = logging.getLogger("crossgate.runs")

Heard = Callable[[Mapping[str, float]], None]


def run(recipe: Recipe) -> dict[str, float]:
    """Trains, selects on validation, measures on test; every rank calls it, rank 0 returns the metrics.

    Raises:
        UserError: for an index, a recipe or a machine that cannot do it.
    """
    with open_run(recipe) as context:
        task, result = _train(context)
        done = measure(task, context)
        if done is None:
            return {}
        context.publish(done, f"{recipe.finetune.task.capitalize()}: {context.directory.name}", result.step)
        context.tracker.log_artifact(result.model_dir, "model")
        return done.metrics


def run_trial(recipe: Recipe, heard: Heard, parent: str = "") -> dict[str, float]:
    """Trains and scores on validation only: one trial of a search, which must not see the test split.

    Args:
        recipe: of the trial.
        heard: gets the validation metrics each time.
        parent: MLflow id of the search's run.
    """
    with open_run(recipe, parent) as context:
        _, result = _train(context, heard)
        return {"step": result.best_step, "value": result.best_value if result.best_value is not None else math.nan}


def _train(context: RunContext, heard: Heard | None = None) -> tuple[Task, FitResult]:
    recipe, data = context.recipe, context.recipe.data
    counts = context.index.class_counts(data.train) if recipe.finetune.balance else None
    task = build_task(recipe, context.index.vocabularies, counts)
    assert isinstance(task, FinetuneTask)
    if task.warm_start and context.world.leads:
        log.info("from %s: %s", recipe.finetune.init, task.warm_start)
    card = _card(context, task)

    def validate(task: Task, step: int) -> dict[str, float]:
        scores = _validate(task, context)
        if heard is not None and scores:
            heard(scores)
        return scores

    result = fit(
        task,
        context.training_loader(),
        recipe,
        context.directory,
        context.world,
        tracker=context.tracker,
        validate=validate,
        selection=Selection(selection_metric(len(card.classes)), "higher"),
        save_model=lambda task, folder: save_model(folder, task.model, card),
    )
    return task, result


def selection_metric(classes: int) -> str:
    """Returns the validation metric that decides: average precision for two classes, else accuracy."""
    return "val/average_precision" if classes == 2 else "val/accuracy"


def _validate(task: Task, context: RunContext) -> dict[str, float]:
    recipe = context.recipe
    val = predict_splits(task, context, recipe.data.val, recipe.evaluation.clips)
    if val is None:
        return {}
    name = recipe.finetune.task
    return classifier_scores(val, name, context.index.vocabularies[name], recipe.finetune.positive, recipe.evaluation)


def measure(task: Task, context: RunContext) -> Evaluation | None:
    """Returns the `Evaluation` of the test split, thresholds from validation; None on ranks above 0."""
    recipe, data = context.recipe, context.recipe.data
    limit = recipe.evaluation.clips
    train, val, test = (predict_splits(task, context, names, limit) for names in (data.train, data.val, data.test))
    if train is None or val is None or test is None:
        return None
    name = recipe.finetune.task
    return evaluate_classifier(
        val,
        test,
        context.index.vocabularies[name],
        recipe.finetune.positive,
        recipe.evaluation,
        train,
        task=name,
        seed=recipe.run.seed,
    )


def _card(context: RunContext, task: FinetuneTask) -> ModelCard:
    recipe = context.recipe
    provenance = {key: str(value) for key, value in context.provenance().items()}
    classes = task.model.classes
    return ModelCard(
        kind="classifier",
        model=recipe.model,
        clip=recipe.data.clip,
        task=recipe.finetune.task,
        classes=classes,
        positive=recipe.finetune.positive if len(classes) == 2 else "",
        provenance=provenance | {"recipe_digest": recipe_digest(recipe), "init": recipe.finetune.init},
    )
