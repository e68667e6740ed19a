"""Several fine-tuned models of one task on the same test clips: single modalities, their mean, every gate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crossgate.config import Recipe
from crossgate.evaluation import Predictions, Section, compare_gates, positive_class
from crossgate.evaluation.comparison import TITLES, ComparisonRow, Kind, forest_points, table
from crossgate.evaluation.figures import forest
from crossgate.evaluation.tables import Table
from crossgate.model.classifier import Classifier
from crossgate.model.store import ModelCard, load_model
from crossgate.runs.context import RunContext, open_run
from crossgate.runs.evaluate import of_model, task_of
from crossgate.runs.features import keep_features
from crossgate.runs.predictions import predict_splits


def compare_models(recipe: Recipe, models: Mapping[str, Path]) -> tuple[list[ComparisonRow], Table, Section]:
    """Measures models on validation (for fixed weights) and test, paired by clip.

    Args:
        recipe: index, splits and measurement; its network is replaced by each model's own.
        models: name -> run or model directory.
    """
    predictions: dict[str, tuple[Predictions, Predictions]] = {}
    kinds: dict[str, Kind] = {}
    with open_run(recipe, required=("val", "test"), used=("val", "test")) as context:
        for name, folder in models.items():
            model, card = load_model(folder)
            assert isinstance(model, Classifier)
            kinds[name] = model.network.fusion.kind
            predictions[name] = _predict(context, model, card)
        task = recipe.finetune.task
        classes = context.index.vocabularies[task]
        rows = compare_gates(
            predictions,
            kinds,
            task,
            classes,
            recipe.evaluation,
            positive=recipe.finetune.positive,
            seed=recipe.run.seed,
        )
    metric = "accuracy" if positive_class(classes, recipe.finetune.positive) is None else "average_precision"
    shown = table(rows, metric, f"{task} on the test groups")
    caption = "Points are scores on groups never trained on, bars 95 % intervals over groups."
    section = Section(f"{task.capitalize()}: one modality, their mean, each gate", tables=[shown])
    section.figures.append((forest(forest_points(rows), f"{task}: {TITLES.get(metric, metric)}"), caption))
    return rows, shown, section


def _predict(context: RunContext, model: Classifier, card: ModelCard) -> tuple[Predictions, Predictions]:
    recipe = of_model(context.recipe, card)
    task = task_of(recipe, card, context.index.vocabularies).to(context.world.device)
    task.model.load_state_dict(model.state_dict())
    assert isinstance(task.model, Classifier)
    if recipe.finetune.features:  # the models' encoders are the same frozen ones
        keep_features(task.model.network, context, ("val", "test"))
    val, test = (predict_splits(task, context, part, recipe.evaluation.clips) for part in ("val", "test"))
    assert val is not None and test is not None  # a comparison runs in one process
    return val, test
