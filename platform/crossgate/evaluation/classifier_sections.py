"""Sections of a classifier's report: the result, whether the gate is worth it, what the gate does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from crossgate.config import EvaluationConfig
from crossgate.evaluation import comparison, figures, gates
from crossgate.evaluation.evaluation import Drawn, Evaluation
from crossgate.evaluation.gates import GateReport
from crossgate.evaluation.intervals import MINIMUM_GROUPS, Interval
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.report import Section
from crossgate.evaluation.results import metric_name
from crossgate.evaluation.scored import Scored
from crossgate.evaluation.tables import Table, bounds, number, percent, verdict

NAMES = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5 accuracy",
    "mean_class_accuracy": "mean-class accuracy",
    "macro_f1": "macro F1",
    "average_precision": "average precision",
    "roc_auc": "ROC-AUC",
    "f1": "F1",
    "accuracy_argmax": "accuracy at probability 0.5",
    "balanced_accuracy": "balanced accuracy",
    "fnr_at_fixed_fpr": "positives missed at the fixed alarm rate",
    "fpr_at_fixed_fpr": "false alarms at that threshold",
    "nll": "negative log-likelihood (nats)",
    "ece": "expected calibration error",
}

_WORTH = [
    "The baseline to beat is the plain average of the single modalities' probabilities, not one modality alone. Single "
    "modalities are this model's own unimodal heads; fixed weights were chosen on validation.",
    "Controls: the gate's weights applied to the single heads; the same weights, each clip getting another clip's "
    "(shuffled gate); a model that sees nothing but which modalities are there (mask only); and, for accuracy, an "
    "upper bound that is right wherever any single head is (oracle).",
]

_FUSED = "this model"
Array = NDArray[Any]


def add_result(done: Evaluation, scored: Scored, chance: dict[str, float], config: EvaluationConfig) -> None:
    """Adds how often the classifier is right, against chance.

    Args:
        chance: name of a way to guess -> its accuracy.
    """
    question, scores, groups = scored.question, scored.scores, scored.bootstrap.groups
    done.summary = (
        f"On {len(scored.clips)} test {config.unit}s of {groups} groups, the {question.task} classifier is right on "
        f"{percent(scores['accuracy'].value)} of the {config.unit}s (95 % interval {bounds(scores['accuracy'])}). "
        f"Always answering the commonest class gives {percent(chance['majority'])}, guessing "
        f"{percent(chance['uniform'])}: {verdict(scores['accuracy'], max(chance.values()))}."
    )
    text = ["Intervals resample whole groups, so that clips of one video count as one witness."]
    drawn: list[Drawn] = []
    if question.index is not None:
        text.append(_ranking(done, scored, config.fixed_fpr))
        drawn = _curves(scored, config.fixed_fpr)
    rows = [[NAMES.get(name, name), *_cells(name, one)] for name, one in scores.items()]
    caption = f"{len(scored.clips)} test {config.unit}s, {groups} groups, {config.bootstrap} resamples of groups."
    dropped = max(one.dropped for one in scores.values())
    if dropped and groups >= MINIMUM_GROUPS:
        caption += f" In up to {dropped} resamples a score was undefined (one class only) and left out."
    matrix = figures.confusion(scored.labels, scored.predicted, question.classes)
    how = "Each row is a true class and sums to 100 %; the diagonal is right, the rest shows what it is taken for."
    done.add(
        Section(f"Result: {question.task}", text, [Table(["measure", "value", "95 % interval"], rows, caption)]),
        (f"{question.task}_confusion", matrix, how),
        *drawn,
    )


def _ranking(done: Evaluation, scored: Scored, fixed_fpr: float) -> str:
    """Adds what the scores of the positive class are worth; returns how its thresholds were chosen."""
    ap, missed = scored.scores["average_precision"], scored.scores["fnr_at_fixed_fpr"]
    base = float(scored.truth.mean())
    done.metrics |= {
        "val/threshold_fixed_fpr": scored.thresholds.low_alarm,
        "test/chance_average_precision": base,
    }
    done.summary += (
        f"\n\nRanked by the score of {scored.question.positive!r}, average precision is {percent(ap.value)} "
        f"({bounds(ap)}); chance is {percent(base)}. With at most {percent(fixed_fpr, 0)} false alarms on validation, "
        f"{percent(missed.value)} ({bounds(missed)}) of the positives are missed."
    )
    return (
        f"Thresholds were chosen on validation: {scored.thresholds.decision:.3f} for the highest balanced accuracy, "
        f"{scored.thresholds.low_alarm:.3f} for at most {percent(fixed_fpr, 0)} false alarms."
    )


def _curves(scored: Scored, fixed_fpr: float) -> list[Drawn]:
    return [
        (
            f"{scored.question.task}_precision_recall",
            figures.precision_recall(scored.positive_scores, scored.truth, scored.bootstrap),
            "Precision over recall as the threshold falls from left to right; higher is better, the dashed line "
            "is what a random order gives, the band is the 95 % interval by groups.",
        ),
        (
            f"{scored.question.task}_roc",
            figures.roc(scored.positive_scores, scored.truth, scored.bootstrap, fixed_fpr),
            f"Positives found against false alarms; the upper left corner is perfect, the dotted line is the "
            f"fixed rate of {percent(fixed_fpr, 0)} false alarms.",
        ),
    ]


def _cells(name: str, one: Interval) -> list[str]:
    if name == "ece":
        return [percent(one.value), ""]  # resampling biases it upwards
    if name == "nll":
        return [number(one.value), bounds(one, as_percent=False)]
    return [percent(one.value), bounds(one)]


def add_comparison(done: Evaluation, scored: Scored, val: Predictions, fitted: Predictions, seed: int) -> None:
    """Adds the model beside averages of its single modalities and beside controls, where it has single heads.

    Args:
        val: labelled clips on which fixed weights are chosen.
        fitted: labelled clips on which the control that sees only which modalities are there is fitted.
    """
    test, question = scored.clips, scored.question
    main = comparison.main_metric(question.index)
    entries = comparison.baselines(val, test, question.task, len(question.classes), main, question.index)
    if not entries:
        return
    entries.append(comparison.Entry(_FUSED, "model", scored.probabilities))
    entries += comparison.controls(test, question.task, len(question.classes), fitted, seed)
    tables, drawn = [], None
    for metric in dict.fromkeys((main, "accuracy")):
        fair = [e for e in entries if e.name != "oracle" or metric == "accuracy"]  # its scores know the truth
        rows = comparison.compare(fair, scored.labels, scored.bootstrap, metric, question.index)
        for row in rows:
            stem = metric_name("test", "compare", row.name, metric)
            done.put(stem, row.score)
            if row.difference is not None:
                done.put(f"{stem}_gain", row.difference)
        title = comparison.TITLES[metric]
        caption = f"{title[0].upper()}{title[1:]} on the test clips; differences are paired by clip."
        if metric == "accuracy" and question.index is not None:
            caption += " All answer from probability 0.5 on, so that they are alike."
        tables.append(comparison.table(rows, metric, caption))
        if drawn is None:
            reference = next(row.score for row in rows if row.name == comparison.REFERENCE)
            drawn = figures.forest(comparison.forest_points(rows), title, reference=reference)
    assert drawn is not None
    done.add(
        Section("Is the gate worth it?", _WORTH, tables),
        (
            f"{question.task}_comparison",
            drawn,
            "Dots are test scores, lines their 95 % intervals, the grey band the interval of the uniform mean; "
            "the paired differences in the table are sharper than overlapping intervals suggest.",
        ),
        (
            f"{question.task}_calibration",
            figures.reliability(_before_and_after(entries), scored.labels),
            figures.RELIABILITY,
        ),
    )


def _before_and_after(entries: Sequence[comparison.Entry]) -> dict[str, tuple[str, Array]]:
    """Returns the uniform mean of the single modalities and the fused model."""
    shown = (one for one in entries if one.name in (comparison.REFERENCE, _FUSED))
    return {one.name: (comparison.hue(one.name, one.kind), one.probabilities) for one in shown}


def add_gate(done: Evaluation, scored: Scored) -> None:
    """Adds what the gate does: weights by modality and class, and whether they follow degradation."""
    test, question = scored.clips, scored.question
    assert test.weights is not None
    report = gates.diagnose(
        [test.weights],
        test.present,
        scored.labels,
        len(question.classes),
        test.degraded,
        test.modalities,
        scored.bootstrap,
        None if test.unimodal_logits is None else [test.unimodal_logits],
    )
    done.put("test/gate/entropy", report.entropy)
    done.put("test/gate/collapse", report.collapse)
    text = [
        f"Entropy of the weights relative to uniform is {number(report.entropy.value, 2)} (1: all alike, 0: one "
        f"modality alone); in {percent(report.collapse.value)} of the clips one modality takes more than "
        f"{percent(gates.COLLAPSED, 0)} of the weight."
    ]
    drawn = [
        (
            f"{question.task}_gate_by_class",
            figures.gate_by_class(report.by_class, question.classes, test.modalities),
            figures.GATE_BY_CLASS,
        )
    ]
    if report.knows_severity:
        drawn.append(
            (
                f"{question.task}_gate_by_severity",
                figures.gate_by_severity(report),
                figures.GATE_BY_SEVERITY,
            )
        )
    done.add(Section("What the gate does", text, [_weights_table(done, report, test.modalities)]), *drawn)


def _weights_table(done: Evaluation, report: GateReport, modalities: Sequence[str]) -> Table:
    """A row a modality; its numbers become metrics too."""
    rows = []
    for name in modalities:
        weight = report.by_modality[name]
        done.put(f"test/gate/weight_{name}", weight)
        cells = [name, number(weight.value), bounds(weight, False)]
        for kind, found in (("severity", report.with_severity), ("right", report.with_right)):
            one = found.get(name)
            if one is None or math.isnan(one.value):
                cells.append("n/a")
                continue
            done.put(f"test/gate/correlation_{kind}_{name}", one)
            cells.append(f"{one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f})")
        rows.append(cells)
    columns = ["modality", "mean weight", "95 % interval", "correlation with severity", "correlation with being right"]
    caption = (
        "A gate that works has a negative correlation with the severity of degradation of its modality, and a "
        "positive one with that modality's own head being right."
    )
    return Table(columns, rows, caption)
