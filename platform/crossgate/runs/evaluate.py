"""An evaluation run: a model that exists, measured on the splits of an index, with a report."""

from __future__ import annotations

from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.model.store import ModelCard, load_model
from crossgate.runs import finetune, pretrain
from crossgate.runs.context import PARTS, Part, RunContext, open_run
from crossgate.runs.frames import check_frames
from crossgate.tasks import build_task
from crossgate.tasks.task import Task
from crossgate.training.checkpoint import store_recipe


def run(recipe: Recipe) -> dict[str, float]:
    """Measures `evaluation.model`; every rank calls it, rank 0 returns the metrics.

    Raises:
        UserError: when there is no such model, or the index lacks its labels.
    """
    if not recipe.evaluation.model:
        raise UserError("no model to measure", where="evaluation.model", cure="set it to a run or model directory")
    model, card = load_model(recipe.evaluation.model)
    recipe = of_model(recipe, card)
    needed: tuple[Part, ...] = ("val", "test") if card.kind == "classifier" else ("train", "test")
    used = needed if card.kind == "classifier" else PARTS
    with open_run(recipe, required=needed, used=used) as context:
        if card.kind == "classifier":
            check_classes(context, card)
            check_frames(context)
        task = task_of(recipe, card, context.index.vocabularies).to(context.world.device)
        task.model.load_state_dict(model.state_dict())
        if context.world.leads:
            store_recipe(context.directory, recipe)
        measure = finetune.measure if card.kind == "classifier" else pretrain.measure
        done = measure(task, context)
        if done is None:
            return {}
        context.publish(done, f"Evaluation: {recipe.evaluation.model}", step=0)
        return done.metrics


def check_classes(context: RunContext, card: ModelCard) -> None:
    """Checks that the run's index means by its labels what the classifier does.

    Raises:
        UserError: when the index has other classes, or none, of the model's task.
    """
    if tuple(context.index.vocabularies.get(card.task, ())) != card.classes:
        raise UserError(
            f"the index's classes of '{card.task}' are not the model's",
            where=context.recipe.data.index,
            expected=", ".join(card.classes),
        )


def of_model(recipe: Recipe, card: ModelCard) -> Recipe:
    """The recipe with what the model brings along: network (its own weights, no downloaded ones), clip, task."""
    data = recipe.data.model_copy(update={"clip": card.clip})
    label = {"task": card.task, "positive": card.positive or recipe.finetune.positive, "init": ""}
    supervised = recipe.finetune.model_copy(update=label if card.task else {})
    return recipe.model_copy(update={"model": card.model.from_scratch(), "data": data, "finetune": supervised})


def task_of(recipe: Recipe, card: ModelCard, vocabularies) -> Task:
    kind = "finetune" if card.kind == "classifier" else "pretrain"
    return build_task(recipe.model_copy(update={"kind": kind}), vocabularies)
