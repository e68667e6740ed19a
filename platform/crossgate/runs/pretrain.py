"""A pretraining run: contrast, then what the frozen features are worth against random ones."""

from __future__ import annotations

from crossgate.config import Recipe
from crossgate.evaluation import Evaluation, Predictions, evaluate_pretrain, retrieval_scores
from crossgate.model.store import ModelCard, save_model
from crossgate.recipe import recipe_digest
from crossgate.runs.context import RunContext, open_run
from crossgate.runs.predictions import predict_splits
from crossgate.tasks import build_task
from crossgate.tasks.task import Task
from crossgate.training.loop import Selection, fit


def run(recipe: Recipe) -> dict[str, float]:
    """Trains and measures; every rank calls it, rank 0 returns the metrics.

    Raises:
        UserError: for an index, a recipe or a machine that cannot do it.
    """
    with open_run(recipe) as context:
        task = build_task(recipe, context.index.vocabularies)
        result = fit(
            task,
            context.training_loader(),
            recipe,
            context.directory,
            context.world,
            tracker=context.tracker,
            validate=lambda task, step: _validate(task, context),
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
    val = predict_splits(task, context, context.recipe.data.val, config.gallery)
    return retrieval_scores(val, config, context.recipe.run.seed) if val else {}


def measure(task: Task, context: RunContext) -> Evaluation | None:
    """Measures frozen features of the trained and of an untrained network; None on ranks above 0."""
    recipe = context.recipe
    trained = _splits(task, context)
    random = None
    if recipe.evaluation.random_baseline and recipe.evaluation.probe:
        fresh = build_task(recipe, context.index.vocabularies).to(context.world.device)
        random = _splits(fresh, context)
    if trained is None:
        return None
    train, val, test = trained
    return evaluate_pretrain(
        train, val, test, context.index.vocabularies, recipe.evaluation, random, seed=recipe.run.seed
    )


def _splits(task: Task, context: RunContext) -> tuple[Predictions, Predictions, Predictions] | None:
    data, limit = context.recipe.data, context.recipe.evaluation.clips
    found = [predict_splits(task, context, names, limit) for names in (data.train, data.val, data.test)]
    train, val, test = found
    return None if train is None or val is None or test is None else (train, val, test)


def _card(context: RunContext) -> ModelCard:
    recipe = context.recipe
    return ModelCard(
        kind="contrastive",
        model=recipe.model,
        clip=recipe.data.clip,
        provenance={key: str(value) for key, value in context.provenance().items()}
        | {"recipe_digest": recipe_digest(recipe)},
    )
