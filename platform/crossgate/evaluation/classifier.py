"""Evaluation of a fine-tuned classifier: scores, slices, and the report's sections about it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from crossgate.config import EvaluationConfig
from crossgate.evaluation import classification
from crossgate.evaluation.classifier_sections import add_comparison, add_gate, add_result
from crossgate.evaluation.evaluation import Evaluation
from crossgate.evaluation.intervals import Bootstrap, mean
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.results import metric_name
from crossgate.evaluation.scored import Question, Scored
from crossgate.evaluation.slices import slices
from crossgate.evaluation.videos import by_video


def classifier_scores(
    val: Predictions, task: str, classes: Sequence[str], positive: str, config: EvaluationConfig
) -> dict[str, float]:
    """Validation scores without intervals (``val/accuracy`` ...), for the training loop and for selection.

    ``val/threshold`` of a binary task is the probability of its positive class from which on the model answers with it.
    """
    val = _units(val.labelled(task), config)
    if not len(val) or val.logits is None:
        return {}
    question = Question(task, classes, positive)
    quick = Bootstrap(np.zeros(len(val)), resamples=1)  # one group: no interval is drawn
    scored = Scored(question, val, question.thresholds(val, config.fixed_fpr), quick)
    found = {f"val/{name}": one.value for name, one in scored.scores.items() if not math.isnan(one.value)}
    found |= {f"val/nll_{name}": value for name, value in head_losses(val, task).items()}
    return found if question.index is None else found | {"val/threshold": scored.thresholds.decision}


def head_losses(val: Predictions, task: str) -> dict[str, float]:
    """Returns modality -> mean log loss of its own head, in nats, over the clips that have it."""
    if val.unimodal_logits is None:
        return {}
    losses = -log_softmax(val.unimodal_logits, axis=-1)  # (N, M, K)
    true = np.take_along_axis(losses, val.labels[task][:, None, None], axis=2)[..., 0]  # (N, M)
    return {
        name: float(true[val.present[:, m], m].mean())
        for m, name in enumerate(val.modalities)
        if val.present[:, m].any()
    }


def evaluate_classifier(
    val: Predictions,
    test: Predictions,
    classes: Sequence[str],
    positive: str,
    config: EvaluationConfig,
    train: Predictions | None = None,
    *,
    task: str,
    seed: int = 0,
) -> Evaluation:
    """Measures a fine-tuned classifier; thresholds and fixed weights come from `val`, `test` is only scored.

    Args:
        val, test: predictions with logits; clips without a label of the task are left out.
        classes: names in the order of the logits.
        positive: positive class of a binary task (ignored for more than two classes).
        config: resamples and fixed false-positive rate.
        train: for the majority class and the mask-only control (else validation serves).
        task: label name.
        seed: of resamples and shuffles.

    Raises:
        ValueError: when no test clip has a label of the task, or there are no logits.
    """
    metrics = classifier_scores(val, task, classes, positive, config)
    val, clips = _units(val.labelled(task), config), test.labelled(task)
    if not len(clips) or clips.logits is None:
        raise ValueError(f"no test clip has a label of task {task!r}, or the predictions have no logits")
    test = _units(clips, config)
    fitted = _units(train.labelled(task), config) if train is not None else val
    question = Question(task, classes, positive)
    bootstrap = Bootstrap(test.group, config.bootstrap, seed)
    scored = Scored(question, test, question.thresholds(val, config.fixed_fpr), bootstrap)
    chance = classification.chance(test.labels[task], len(classes), fitted.labels[task])
    done = Evaluation(metrics)
    for name, one in scored.scores.items():
        done.put(f"test/{name}", one)
    done.metrics |= {"test/clips": float(len(clips)), "test/groups": float(bootstrap.groups)}
    if config.unit == "video":
        done.metrics["test/videos"] = float(len(test))
    done.metrics |= {f"test/chance_{name}": value for name, value in chance.items()}
    _slices(done, scored)
    add_result(done, scored, chance, config)
    add_comparison(done, scored, val, fitted, seed)
    if test.weights is not None:
        add_gate(done, scored)
    return done


def _units(clips: Predictions, config: EvaluationConfig) -> Predictions:
    return by_video(clips) if config.unit == "video" and len(clips) else clips


def _slices(done: Evaluation, scored: Scored) -> None:
    right = (scored.predicted == scored.labels).astype(np.float64)
    for name, rows in slices(scored.clips, scored.question.task, scored.question.classes).items():
        accuracy = scored.bootstrap.interval(mean(np.where(rows, right, np.nan)))
        done.put(metric_name("test", "slice", name, "accuracy"), accuracy)
        done.metrics[metric_name("test", "slice", name, "clips")] = float(rows.sum())
