"""One table: each single modality, the uniform mean, each gate; with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossgate.config import EvaluationConfig
from crossgate.evaluation import classification, gates
from crossgate.evaluation.figures import Point
from crossgate.evaluation.intervals import Bootstrap, Difference, Interval, Statistic, mean
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.style import ACCENT, INK, MUTED, colour
from crossgate.evaluation.tables import Table, bounds, p_value, percent, points

Array = NDArray[Any]
Kind = Literal["modality", "average", "fusion", "gate", "model", "control"]

REFERENCE = "uniform mean"
TITLES = {
    "accuracy": "accuracy",
    "mean_class_accuracy": "mean-class accuracy",
    "macro_f1": "macro F1",
    "average_precision": "average precision",
    "roc_auc": "ROC-AUC",
}


@dataclass(frozen=True)
class Entry:
    """A competitor: class probabilities ``(N, K)`` on the common test clips."""

    name: str
    kind: Kind
    probabilities: Array
    note: str = ""


@dataclass(frozen=True)
class ComparisonRow:
    """A competitor's score, and its paired difference to the reference (None for the reference itself)."""

    name: str
    kind: Kind
    score: Interval
    difference: Difference | None
    note: str = ""


def compare(
    entries: Sequence[Entry],
    labels: Array,
    bootstrap: Bootstrap,
    metric: str = "accuracy",
    positive: int | None = None,
    reference: str = REFERENCE,
) -> list[ComparisonRow]:
    """Scores every entry on the same clips and resamples.

    Args:
        entries: competitors, in the order of the table.
        labels: ``(N,)`` truth.
        bootstrap: made from the same clips' groups.
        metric: a key of `TITLES`.
        positive: index of the positive class, for `average_precision` and `roc_auc`.
        reference: name of the entry that the others are compared with.

    Raises:
        ValueError: when the reference is no entry.
    """
    statistics = {entry.name: statistic(metric, entry.probabilities, labels, positive) for entry in entries}
    if reference not in statistics:
        raise ValueError(f"no entry is named {reference!r}")
    return [
        ComparisonRow(
            entry.name,
            entry.kind,
            bootstrap.interval(statistics[entry.name]),
            None if entry.name == reference else bootstrap.difference(statistics[entry.name], statistics[reference]),
            entry.note,
        )
        for entry in entries
    ]


def statistic(metric: str, probabilities: Array, labels: Array, positive: int | None = None) -> Statistic:
    """The named metric of class probabilities as a statistic over resamples.

    Raises:
        ValueError: for an unknown metric, or one of the positive class without `positive`.
    """
    predicted = probabilities.argmax(axis=1)
    if metric == "accuracy":
        return mean(predicted == labels)
    if metric == "mean_class_accuracy":
        return classification.mean_class_accuracy(predicted, labels)
    if metric == "macro_f1":
        return classification.macro_f1(predicted, labels)
    if metric in ("average_precision", "roc_auc") and positive is not None:
        ranked = classification.average_precision if metric == "average_precision" else classification.roc_auc
        return ranked(probabilities[:, positive], labels == positive)
    raise ValueError(f"metric {metric!r}; valid: {', '.join(TITLES)} (the last two need a positive class)")


def main_metric(positive: int | None) -> str:
    """What a task is judged by: average precision where it has a positive class, else accuracy."""
    return "accuracy" if positive is None else "average_precision"


def baselines(
    val: Predictions,
    test: Predictions,
    task: str,
    classes: int,
    metric: str = "accuracy",
    positive: int | None = None,
) -> list[Entry]:
    """Each modality's own head and the averages of them, from one model's unimodal logits.

    The heads of one jointly trained model are a cheap stand-in for separately trained streams; give those to
    `compare` as entries of their own where they exist. Fixed weights and the frequencies that answer for a missing
    modality come from validation.

    Args:
        val, test: labelled clips of the task (see `Predictions.labelled`), with `unimodal_logits`.
        metric, positive: what the fixed weights shall be best in (see `statistic`).
    """
    if test.unimodal_logits is None or val.unimodal_logits is None:
        return []
    seen, labels = test.unimodal_logits, val.labels[task]
    counts = np.bincount(labels, minlength=classes).astype(np.float64)
    prior = counts / counts.sum() if counts.sum() else np.full(classes, 1 / classes)
    found = [
        Entry(f"{name} alone", "modality", gates.single(seen, test.present, m, prior))
        for m, name in enumerate(test.modalities)
    ]
    found.append(Entry(REFERENCE, "average", gates.uniform_probabilities(seen, test.present)))
    if len(test.modalities) > 1:
        found.append(Entry("uniform mean of logits", "average", gates.uniform_logits(seen, test.present)))
        if len(val):
            goal = partial(statistic, metric, positive=positive)
            fixed, _ = gates.fixed_weights(val.unimodal_logits, val.present, labels, goal)
            shared = gates.shares(np.tile(fixed, (len(test), 1)), test.present)
            note = " ".join(f"{w:.1f}" for w in fixed)
            found.append(Entry("fixed weights", "average", gates.mix_probabilities(shared, seen), note))
    return found


def controls(test: Predictions, task: str, classes: int, train: Predictions, seed: int = 0) -> list[Entry]:
    """Shuffled gate, gate on the unimodal heads, mask-only model and oracle, where the arrays permit.

    Args:
        test: labelled clips of the task.
        train: labelled clips that the mask-only model is fitted on (training, or else validation).
        seed: of the shuffle.
    """
    found = []
    if test.unimodal_logits is not None and test.weights is not None:
        shared = gates.shares(test.weights, test.present)
        mixed = gates.mix_probabilities(shared, test.unimodal_logits)
        mismatched = gates.shuffled(test.weights, test.unimodal_logits, test.present, seed)
        found.append(Entry("gate on single heads", "control", mixed))
        found.append(Entry("shuffled gate", "control", mismatched))
    masked = gates.mask_only(train.present, train.labels[task], test.present, classes)
    found.append(Entry("mask only", "control", masked))
    if test.unimodal_logits is not None:
        best = gates.oracle(test.unimodal_logits, test.present, test.labels[task])
        found.append(Entry("oracle", "control", best))
    return found


def compare_gates(
    runs: Mapping[str, tuple[Predictions, Predictions]],
    kinds: Mapping[str, Kind],
    task: str,
    classes: Sequence[str],
    config: EvaluationConfig,
    *,
    positive: str = "",
    metric: str = "",
    streams: str = "",
    seed: int = 0,
) -> list[ComparisonRow]:
    """The table of a gate search: single modalities, their uniform mean, and each fine-tuned gate.

    Args:
        runs: name -> predictions of (validation, test); the clips are matched by key.
        kinds: name -> whether it is a gate, an average, or another fusion that weighs all clips alike.
        task: label name.
        classes: names, in the order of the logits.
        config: number of resamples.
        positive: positive class of a binary task.
        metric: a key of `TITLES` (empty: average precision of a binary task, else accuracy).
        streams: run whose single heads are the baselines (empty: the run ``mean`` if there is one, else the first).
        seed: of the resamples.

    Raises:
        ValueError: when a run lacks clips that another has, or the stream run has no unimodal logits.
    """
    streams = streams or ("mean" if "mean" in runs else next(iter(runs)))
    val, test = (split.labelled(task) for split in runs[streams])
    positive_index = positive_class(classes, positive)
    metric = metric or main_metric(positive_index)
    entries = baselines(val, test, task, len(classes), metric, positive_index)
    if not entries:
        raise ValueError(f"run {streams!r} has no unimodal logits")
    for name, (_, predictions) in runs.items():
        own = predictions.aligned(test.keys)
        if own.logits is None:
            raise ValueError(f"run {name!r} has no logits")
        entries.append(Entry(f"{kinds[name]}: {name}", kinds[name], classification.softmax(own.logits)))
    bootstrap = Bootstrap(test.group, config.bootstrap, seed)
    return compare(entries, test.labels[task], bootstrap, metric, positive_index)


def positive_class(classes: Sequence[str], positive: str) -> int | None:
    """Index of the positive class of a binary task; None for a task of more classes, or without a class so called."""
    return list(classes).index(positive) if len(classes) == 2 and positive in classes else None


def table(rows: Sequence[ComparisonRow], metric: str = "accuracy", caption: str = "") -> Table:
    """The comparison as a table of strings."""
    title = TITLES.get(metric, metric)
    columns = ["model", "what", title, "95 % interval", "points over the uniform mean", "p"]
    cells = [
        [
            row.name,
            f"{row.kind}: {row.note}" if row.note else row.kind,
            percent(row.score.value),
            bounds(row.score),
            points(row.difference) if row.difference is not None else "",
            p_value(row.difference.p) if row.difference is not None else "",
        ]
        for row in rows
    ]
    return Table(columns, cells, caption)


def forest_points(rows: Sequence[ComparisonRow]) -> list[Point]:
    """The comparison as points of a forest plot."""
    return [Point(row.name, row.score, hue(row.name, row.kind)) for row in rows]


def hue(name: str, kind: Kind) -> str:
    """Returns a competitor's colour: modalities have their own, averages are black, what learns blue, controls grey."""
    if kind == "modality":
        return colour(name.split()[0])
    return {"average": INK, "fusion": ACCENT, "gate": ACCENT, "model": ACCENT, "control": MUTED}[kind]
