"""The gate of a release: challenger and champion on the frozen evaluation set, and side by side in time."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from crossgate.config import ClipConfig, Recipe
from crossgate.evaluation import Predictions
from crossgate.evaluation.promotion import Check, latency_checks, quality_checks
from crossgate.evaluation.results import chance_of, read_results
from crossgate.model.classifier import Classifier
from crossgate.model.store import load_model, read_card
from crossgate.registry.aliases import Decision
from crossgate.runs.context import PARTS, open_index, open_run
from crossgate.runs.evaluate import check_classes, of_model, task_of
from crossgate.runs.predictions import predict_splits

_PASSES = 15


def judge(recipe: Recipe, run: Path, champion: Path | None) -> Decision:
    """Decides whether the run's model may take the champion's place.

    Args:
        recipe: of the run; its `release` section is the gate, its `data.test` splits the evaluation set.
        run: directory of the challenger.
        champion: model directory; None where the model would be the first.

    Raises:
        UserError: the evaluation set is not there, or has other classes.
    """
    if champion is None:
        return _decision([Check(True, "there is no champion: the first version is it"), *_doubts(run)])
    new, old = read_card(run / "model"), read_card(champion)
    if (new.task, new.classes) != (old.task, old.classes):
        theirs = f"{old.task}: {', '.join(old.classes)}"
        return _decision([Check(False, f"it has other classes than the champion ({theirs}): give it another name")])
    seen = [_predictions(recipe, run / "model"), _predictions(recipe, champion)]
    checks = quality_checks(
        seen[0],
        seen[1],
        new.task,
        new.classes,
        new.positive,
        recipe.release,
        thresholds=(new.threshold, old.threshold),
        resamples=recipe.evaluation.bootstrap,
        seed=recipe.run.seed,
    )
    checks += latency_checks(*_forward_ms(run / "model", champion), recipe.release)
    trained = {card.provenance.get("index_digest") for card in (new, old)}
    if len(trained) > 1:
        checks.append(Check(True, "note: trained on different indexes; only one may have seen groups of this set"))
    return _decision(checks)


def frozen_set(recipe: Recipe) -> str:
    """Returns what names the evaluation set: the digest of its shards, whatever else the index holds, and its clips.

    Raises:
        UserError: it is not there.
    """
    data = recipe.data.model_copy(update={"index": recipe.release.index or recipe.data.index})
    selection = open_index(recipe.model_copy(update={"data": data})).select(recipe.data.test)
    return f"{min(selection.total, recipe.evaluation.clips)} clips of {selection.digest}"


def _doubts(run: Path) -> list[Check]:
    """What a person should know before a first champion serves, where no other model stands beside it."""
    metrics, _ = read_results(run / "results.json")
    name = next((name for name in ("test/average_precision", "test/accuracy") if name in metrics), "")
    if not name:
        return [Check(True, "WARNING: it was measured on no test clips")]
    low, chance = metrics.get(f"{name}_low", math.nan), chance_of(metrics, name)
    if low > chance:
        return []
    reach = "too few groups for an interval" if math.isnan(low) else f"its interval begins at {low:.3f}"
    return [Check(True, f"WARNING: not shown to beat chance: {name} {metrics[name]:.3f}, {reach}, chance {chance:.3f}")]


def _decision(checks: list[Check]) -> Decision:
    lines = tuple(f"{'ok     ' if check.passed else 'REFUSED'} {check.said}" for check in checks)
    return Decision(all(check.passed for check in checks), lines)


def _predictions(recipe: Recipe, folder: Path) -> Predictions:
    """Returns the model's predictions of the evaluation set, cut into clips as the model wants them."""
    model, card = load_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        own = of_model(recipe, card).model_copy(update={"kind": "evaluate"})
        own.run = own.run.model_copy(update={"output": scratch, "name": "gate"})
        own.tracking = own.tracking.model_copy(update={"enabled": False})
        own.data = own.data.model_copy(update={"index": recipe.release.index or recipe.data.index})
        own.finetune = own.finetune.model_copy(update={"features": "", "freeze": False})
        with open_run(own, required=PARTS[2:], used=PARTS[2:]) as context:
            check_classes(context, card)
            task = task_of(own, card, context.index.vocabularies).to(context.world.device)
            task.model.load_state_dict(model.state_dict())
            found = predict_splits(task, context, "test", own.evaluation.clips)
    assert found is not None  # a release runs in one process
    return found


def _forward_ms(*folders: Path) -> tuple[float, float]:
    """Returns the median forward pass of one whole clip, in turns, so that a busy machine slows down both."""
    models = []
    for folder in folders:
        model, card = load_model(folder)
        assert isinstance(model, Classifier)
        models.append((model.eval(), _whole_clip(card.clip)))
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for number in range(_PASSES + 2):
            for (model, (streams, present)), own in zip(models, times):
                begin = time.perf_counter()
                model(streams, present)
                if number >= 2:  # the first passes choose kernels
                    own.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def _whole_clip(clip: ClipConfig) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    streams = {
        name: torch.zeros((1, *clip.shape(name)), dtype=torch.uint8 if name == "rgb" else torch.float32)
        for name in clip.modalities
    }
    return streams, torch.ones((1, len(clip.modalities)), dtype=torch.bool)
