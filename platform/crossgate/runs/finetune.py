"""A fine-tuning run: a classifier on a pretrained network, selected on validation, measured once on test."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from crossgate.config import ModelConfig, Recipe
from crossgate.errors import writing
from crossgate.evaluation import Evaluation, Predictions, classifier_scores, evaluate_classifier, positive_class
from crossgate.evaluation.frames import add_frames
from crossgate.evaluation.scored import Question
from crossgate.evaluation.selection import Answers
from crossgate.model.store import ModelCard, keep_threshold, model_directory, read_card, save_model
from crossgate.recipe import Stretch, micro_batch, recipe_digest, stretches
from crossgate.runs.context import Part, RunContext, check_labels, open_run
from crossgate.runs.features import FeatureLoader, keep_features
from crossgate.runs.frames import check_frames, spans_of
from crossgate.runs.predictions import known_of, predict_splits
from crossgate.tasks import build_task
from crossgate.tasks.finetune import FinetuneTask
from crossgate.tasks.task import Task
from crossgate.training.checkpoint import newest_whole
from crossgate.training.loop import FitResult, Loader, Selection, fit

log = logging.getLogger("crossgate.runs")

FEW_CLIPS = 30
"""Validation clips below which a difference of ten points is within one standard error."""
UNMEASURED = "There is no test split (data.test is empty): these are validation scores, which chose the weights."

LOG = "log.txt"
"""File in a trial's directory with what it says of itself."""

Heard = Callable[[int, Mapping[str, float]], None]


def run(recipe: Recipe) -> dict[str, float]:
    """Trains, selects on validation, measures on test; every rank calls it, rank 0 returns the metrics.

    Raises:
        UserError: for an index, a recipe or a machine that cannot do it.
    """
    with open_run(recipe, required=("train", "val")) as context:
        check_labels(context.index, recipe, "val", "test")
        check_frames(context)
        task, result = _train(context)
        done = measure(task, context)
        if done is None:
            return {}
        _keep_threshold(result, done.metrics)
        context.publish(done, f"{recipe.finetune.task.capitalize()}: {context.directory.name}", result.step)
        context.tracker.log_artifact(result.model_dir, "model")
        return done.metrics


def run_trial(recipe: Recipe, heard: Heard, parent: str = "", until: int = 0) -> dict[str, float]:
    """Trains and scores on validation only: one trial of a search, which must not see the test split.

    What the kept weights say of each validation clip stays in the run's directory, for paired tests between trials; so
    does what the trial says of itself, since the terminal shows the search.

    Args:
        recipe: of the trial.
        heard: gets step and metrics of each validation before the last step.
        parent: MLflow id of the search's run.
        until: step at which the trial pauses, to be started again later (0: it is trained to its end).
    """
    with open_run(recipe, parent, required=("train", "val"), used=("train", "val")) as context:
        check_labels(context.index, recipe, "val")
        task, result = _train(context, heard, until)
        if until:
            return {"step": result.step}
        val = predict_splits(task, context, "val", recipe.evaluation.clips)
        if val is not None:
            with writing("the trial's answers", context.directory):
                Answers.of(val, recipe.finetune.task).write(context.directory)
            _keep_threshold(result, _scores(val, context))
        return {"step": result.best_step, "value": result.best_value if result.best_value is not None else math.nan}


def _train(context: RunContext, heard: Heard | None = None, until: int = 0) -> tuple[Task, FitResult]:
    """Trains stretch by stretch: what a setting shapes is built anew where the setting changes."""
    parts = stretches(context.recipe, until)
    done = _step_of(context) if len(parts) > 1 else 0
    left = [part for part in parts[:-1] if part.until > done] + parts[-1:]
    for part in left:
        task, result = _train_stretch(context, part, heard, first=part is left[0])
    best = next(part for part in parts if not part.until or result.best_step <= part.until)
    if not until and best.settings.model != left[-1].settings.model:  # what they were validated with is kept as well
        task, result = _train_stretch(context, replace(best, until=0), heard, first=False)
    return task, result


def _step_of(context: RunContext) -> int:
    """Returns the step of the run's newest whole checkpoint."""
    checkpoint = newest_whole(context.directory)[0] if context.world.leads else None
    return context.world.from_leader(checkpoint.step if checkpoint else 0)


def _train_stretch(context: RunContext, part: Stretch, heard: Heard | None, first: bool) -> tuple[Task, FitResult]:
    recipe, data = part.settings, part.settings.data
    counts = context.index.class_counts(data.train) if recipe.finetune.balance else None
    task = build_task(recipe, context.index.vocabularies, counts)
    assert isinstance(task, FinetuneTask)
    card = card_of(context, task.model.classes, recipe.model)
    metric = selection_metric(card.classes, recipe.finetune.positive)
    if first and context.world.leads:
        _say_if_few(context)
        _say_what_begins(recipe, task, card, metric)

    loader = _loader(task, context, measured=heard is None)
    last = recipe.training.steps or recipe.training.epochs * loader.steps_per_epoch

    def validate(task: Task, step: int) -> dict[str, float]:
        scores = _validate(task, context)
        if heard is not None and scores and step < last:
            heard(step, scores)
        return scores

    result = fit(
        task,
        loader,
        recipe,
        context.directory,
        context.world,
        tracker=context.tracker,
        validate=validate,
        selection=Selection(metric, "higher"),
        save_model=lambda task, folder: save_model(folder, task.model, card),
        stretch=part,
        log=context.directory / LOG if heard is not None else None,
    )
    return task, result


def _say_what_begins(recipe: Recipe, task: FinetuneTask, card: ModelCard, metric: str) -> None:
    """Rank 0 says what is taken over, and by what the weights are chosen where that may surprise."""
    if task.warm_start:
        log.info("from %s: %s", recipe.finetune.init, task.warm_start)
        if random := task.warm_start.random:
            first = f"{random[0]}: {task.warm_start.skipped[random[0]]}"
            log.warning(
                "%d parts of the encoders start from random weights (%s): set model and data.clip as in %s",
                len(random), first, recipe.finetune.init,
            )  # fmt: skip
        if (
            "fusion" in task.warm_start.skipped
            and read_card(model_directory(recipe.finetune.init)).kind == "classifier"
        ):
            reason = task.warm_start.skipped["fusion"]
            log.warning("the gate of %s stays behind (%s): set model.fusion to keep it", recipe.finetune.init, reason)
    elif recipe.finetune.freeze:
        log.warning("the frozen encoders hold random weights: set finetune.init to a pretrained run")
    if len(card.classes) == 2 and not card.positive:
        named = " and ".join(card.classes)
        log.info("finetune.positive %r is neither of %s: selected by %s", recipe.finetune.positive, named, metric)


def _say_if_few(context: RunContext) -> None:
    """A best step chosen by a handful of clips is chosen by luck."""
    name = context.recipe.finetune.task
    counts = context.index.class_counts(context.recipe.data.val)[name]
    if sum(counts) < FEW_CLIPS:
        log.warning(
            "%d validation clips choose the weights of '%s': fewer than %d, so their order is mostly luck",
            sum(counts), name, FEW_CLIPS,
        )  # fmt: skip


def _loader(task: FinetuneTask, context: RunContext, measured: bool) -> Loader:
    """Clips, or features of the frozen encoders; a run that is not measured does not touch the test split."""
    recipe, world = context.recipe, context.world
    if not recipe.finetune.features:
        return context.training_loader()
    parts: tuple[Part, ...] = ("train", "val", "test") if measured and recipe.data.test else ("train", "val")
    network = task.to(world.device).model.network
    identity = keep_features(network, context, parts)
    train = context.kept["train"]
    network.standardise(torch.stack([train.streams[name] for name in network.modalities], dim=1), train.present)
    return FeatureLoader(
        train,
        recipe.data,
        identity,
        seed=recipe.run.seed,
        rank=world.rank,
        ranks=world.ranks,
        micro_batch=micro_batch(recipe, world.ranks),
    )


def selection_metric(classes: Sequence[str], positive: str) -> str:
    """Returns the validation metric that decides: average precision of the positive class, if the task has it."""
    return "val/accuracy" if positive_class(classes, positive) is None else "val/average_precision"


def _validate(task: Task, context: RunContext) -> dict[str, float]:
    recipe = context.recipe
    val = predict_splits(task, context, "val", recipe.evaluation.clips)
    train = predict_splits(task, context, "train", recipe.evaluation.clips) if recipe.finetune.measure_train else None
    found = {} if val is None else _scores(val, context)
    return found if train is None else found | _log_losses(train, context)


def _scores(val: Predictions, context: RunContext) -> dict[str, float]:
    recipe, name = context.recipe, context.recipe.finetune.task
    return classifier_scores(val, name, context.index.vocabularies[name], recipe.finetune.positive, recipe.evaluation)


def _log_losses(train: Predictions, context: RunContext) -> dict[str, float]:
    """Log losses of training clips, by the names of validation's."""
    found = _scores(train, context)
    return {f"train/{name.removeprefix('val/')}": loss for name, loss in found.items() if name.startswith("val/nll")}


def _keep_threshold(result: FitResult, scores: Mapping[str, float]) -> None:
    """The weights that were kept answer, wherever they go, by the threshold that their report was made with."""
    if "val/threshold" in scores:
        keep_threshold(result.model_dir, scores["val/threshold"])


def measure(task: Task, context: RunContext) -> Evaluation | None:
    """Returns the `Evaluation` of the test split, thresholds from validation; None on ranks above 0.

    Training clips serve for the frequencies that knowing nothing answers with; where the model comes from elsewhere
    (kind evaluate), validation clips do.
    """
    recipe, name = context.recipe, context.recipe.finetune.task
    classes, limit = context.index.vocabularies[name], recipe.evaluation.clips
    train = None
    if context.world.leads and recipe.kind != "evaluate" and recipe.data.test:
        train = known_of(context, "train", limit)
    val = predict_splits(task, context, "val", limit)
    test = predict_splits(task, context, "test", limit) if recipe.data.test else None
    if val is None:
        return None
    if test is None:
        return Evaluation(_scores(val, context), summary=UNMEASURED)
    positive, config, seed = recipe.finetune.positive, recipe.evaluation, recipe.run.seed
    done = evaluate_classifier(val, test, classes, positive, config, train, task=name, seed=seed)
    if config.frames:
        question = Question(name, classes, positive)
        add_frames(done, test.labelled(name), spans_of(context), question, config.bootstrap, seed)
    return done


def card_of(context: RunContext, classes: tuple[str, ...], model: ModelConfig) -> ModelCard:
    """Returns the card of a classifier that this run trains."""
    recipe = context.recipe
    provenance = {key: str(value) for key, value in context.provenance().items()}
    return ModelCard(
        kind="classifier",
        model=model,
        clip=recipe.data.clip,
        task=recipe.finetune.task,
        classes=classes,
        positive=recipe.finetune.positive if positive_class(classes, recipe.finetune.positive) is not None else "",
        provenance=provenance | {"recipe_digest": recipe_digest(recipe), "init": recipe.finetune.init},
    )
