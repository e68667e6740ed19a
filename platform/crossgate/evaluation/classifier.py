"""Evaluation of a fine-tuned classifier: scores, gate diagnostics, comparison, figures and report sections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from crossgate.config import EvaluationConfig
from crossgate.evaluation import classification, comparison, figures, gates
from crossgate.evaluation.classification import Thresholds
from crossgate.evaluation.intervals import MINIMUM_GROUPS, Bootstrap, Interval, mean
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.report import Section
from crossgate.evaluation.results import metric_name
from crossgate.evaluation.slices import slices
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


@dataclass
class Evaluation:
    """What an evaluation hands on.

    Attributes:
        metrics: flat names -> floats, for `write_results` and the tracker.
        figures: file stem -> figure.
        sections: of the report, holding the same figures.
        summary: the result in a sentence or two.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    summary: str = ""

    def add(self, section: Section, *drawn: tuple[str, Figure, str]) -> None:
        """Adds a section with figures given as (file stem, figure, how to read it)."""
        for stem, figure, caption in drawn:
            self.figures[stem] = figure
            section.figures.append((figure, caption))
        self.sections.append(section)

    def put(self, name: str, interval: Interval) -> None:
        """Adds a metric with its interval."""
        self.metrics.update({k: v for k, v in interval.metrics(name).items() if not math.isnan(v)})


def classifier_scores(
    val: Predictions, task: str, classes: Sequence[str], positive: str, config: EvaluationConfig
) -> dict[str, float]:
    """Validation scores without intervals (``val/accuracy`` ...), for the training loop and for selection."""
    val = val.labelled(task)
    if not len(val) or val.logits is None:
        return {}
    quick = Bootstrap(np.zeros(len(val)), resamples=1)  # one group: no interval is drawn
    scores = _scores(val, task, classes, positive, _thresholds(val, task, classes, positive, config), quick)
    return {f"val/{name}": one.value for name, one in scores.items() if not math.isnan(one.value)}


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
    val, test = val.labelled(task), test.labelled(task)
    if not len(test) or test.logits is None:
        raise ValueError(f"no test clip has a label of task {task!r}, or the predictions have no logits")
    fitted = train.labelled(task) if train is not None else val
    bootstrap = Bootstrap(test.group, config.bootstrap, seed)
    thresholds = _thresholds(val, task, classes, positive, config)
    scores = _scores(test, task, classes, positive, thresholds, bootstrap)
    chance = classification.chance(test.labels[task], len(classes), fitted.labels[task])
    done = Evaluation(metrics)
    for name, one in scores.items():
        done.put(f"test/{name}", one)
    done.metrics |= {"test/clips": float(len(test)), "test/groups": float(bootstrap.groups)}
    done.metrics |= {f"test/chance_{name}": value for name, value in chance.items()}
    _slices(done, test, task, classes, bootstrap)
    _result(done, test, task, classes, positive, config, thresholds, scores, chance, bootstrap)
    _comparison(done, val, test, fitted, task, classes, positive, bootstrap, seed)
    if test.weights is not None:
        _gate(done, test, task, classes, bootstrap)
    return done


def _slices(done: Evaluation, test: Predictions, task: str, classes: Sequence[str], bootstrap: Bootstrap) -> None:
    assert test.logits is not None
    right = (test.logits.argmax(axis=1) == test.labels[task]).astype(np.float64)
    for name, rows in slices(test, task, classes).items():
        done.put(
            metric_name("test", "slice", name, "accuracy"), bootstrap.interval(mean(np.where(rows, right, np.nan)))
        )
        done.metrics[metric_name("test", "slice", name, "clips")] = float(rows.sum())


def _thresholds(
    val: Predictions, task: str, classes: Sequence[str], positive: str, config: EvaluationConfig
) -> Thresholds:
    index = comparison.positive_class(classes, positive)
    if index is None or val.logits is None or not len(val):
        return Thresholds(0.5, 0.5)
    scores = classification.softmax(val.logits)[:, index]
    return classification.choose_thresholds(scores, val.labels[task] == index, config.fixed_fpr)


def _scores(
    split: Predictions,
    task: str,
    classes: Sequence[str],
    positive: str,
    thresholds: Thresholds,
    bootstrap: Bootstrap,
) -> dict[str, Interval]:
    assert split.logits is not None
    probabilities, labels = classification.softmax(split.logits), split.labels[task]
    index = comparison.positive_class(classes, positive)
    if index is None:
        return classification.multiclass(probabilities, labels, bootstrap)
    return classification.binary(probabilities[:, index], labels == index, thresholds, bootstrap)


def _result(
    done: Evaluation,
    test: Predictions,
    task: str,
    classes: Sequence[str],
    positive: str,
    config: EvaluationConfig,
    thresholds: Thresholds,
    scores: dict[str, Interval],
    chance: dict[str, float],
    bootstrap: Bootstrap,
) -> None:
    assert test.logits is not None
    probabilities, labels = classification.softmax(test.logits), test.labels[task]
    index = comparison.positive_class(classes, positive)
    bar = max(chance.values())
    done.summary = (
        f"On {len(test)} test clips of {bootstrap.groups} groups, the {task} classifier is right on "
        f"{percent(scores['accuracy'].value)} of the clips (95 % interval {bounds(scores['accuracy'])}). Always "
        f"answering the commonest class gives {percent(chance['majority'])}, guessing {percent(chance['uniform'])}: "
        f"{verdict(scores['accuracy'], bar)}."
    )
    text = ["Intervals resample whole groups, so that clips of one video count as one witness."]
    predicted = probabilities.argmax(axis=1)
    drawn = []
    if index is not None:
        ap = scores["average_precision"]
        predicted = np.where(probabilities[:, index] >= thresholds.decision, index, 1 - index)
        done.metrics |= {
            "val/threshold": thresholds.decision,
            "val/threshold_fixed_fpr": thresholds.low_alarm,
            "test/chance_average_precision": float((labels == index).mean()),
        }
        done.summary += (
            f"\n\nRanked by the score of {positive!r}, average precision is {percent(ap.value)} ({bounds(ap)}); "
            f"chance is {percent(float((labels == index).mean()))}. With at most {percent(config.fixed_fpr, 0)} false "
            f"alarms on validation, {percent(scores['fnr_at_fixed_fpr'].value)} "
            f"({bounds(scores['fnr_at_fixed_fpr'])}) of the positives are missed."
        )
        text.append(
            f"Thresholds were chosen on validation: {thresholds.decision:.3f} for the highest balanced accuracy, "
            f"{thresholds.low_alarm:.3f} for at most {percent(config.fixed_fpr, 0)} false alarms."
        )
        drawn = [
            (
                f"{task}_precision_recall",
                figures.precision_recall(probabilities[:, index], labels == index, bootstrap),
                "Precision over recall as the threshold falls from left to right; higher is better, the dashed line "
                "is what a random order gives, the band is the 95 % interval by groups.",
            ),
            (
                f"{task}_roc",
                figures.roc(probabilities[:, index], labels == index, bootstrap, config.fixed_fpr),
                f"Positives found against false alarms; the upper left corner is perfect, the dotted line is the "
                f"fixed rate of {percent(config.fixed_fpr, 0)} false alarms.",
            ),
        ]
    matrix = figures.confusion(labels, predicted, classes)
    how = "Each row is a true class and sums to 100 %; the diagonal is right, the rest shows what it is taken for."
    rows = [[NAMES.get(name, name), *_cells(name, one)] for name, one in scores.items()]
    caption = f"{len(test)} test clips, {bootstrap.groups} groups, {config.bootstrap} resamples of groups."
    dropped = max(one.dropped for one in scores.values())
    if dropped and bootstrap.groups >= MINIMUM_GROUPS:
        caption += f" In up to {dropped} resamples a score was undefined (one class only) and left out."
    done.add(
        Section(f"Result: {task}", text, [Table(["measure", "value", "95 % interval"], rows, caption)]),
        (f"{task}_confusion", matrix, how),
        *drawn,
    )


def _cells(name: str, one: Interval) -> list[str]:
    if name == "ece":
        return [percent(one.value), ""]  # resampling biases it upwards
    if name == "nll":
        return [number(one.value), bounds(one, as_percent=False)]
    return [percent(one.value), bounds(one)]


def _comparison(
    done: Evaluation,
    val: Predictions,
    test: Predictions,
    fitted: Predictions,
    task: str,
    classes: Sequence[str],
    positive: str,
    bootstrap: Bootstrap,
    seed: int,
) -> None:
    assert test.logits is not None
    entries = comparison.baselines(val, test, task, len(classes))
    if not entries:
        return
    entries.append(comparison.Entry("this model", "gate", classification.softmax(test.logits)))
    entries += comparison.controls(test, task, len(classes), fitted, seed)
    index = comparison.positive_class(classes, positive)
    tables, drawn = [], None
    for metric in ("accuracy",) if index is None else ("average_precision", "accuracy"):
        fair = [e for e in entries if e.name != "oracle" or metric == "accuracy"]  # its scores know the truth
        rows = comparison.compare(fair, test.labels[task], bootstrap, metric, index)
        for row in rows:
            stem = metric_name("test", "compare", row.name, metric)
            done.put(stem, row.score)
            if row.difference is not None:
                done.put(f"{stem}_gain", row.difference)
        title = comparison.TITLES[metric]
        caption = f"{title[0].upper()}{title[1:]} on the test clips; differences are paired by clip."
        tables.append(comparison.table(rows, metric, caption))
        if drawn is None:
            reference = next(row.score for row in rows if row.name == comparison.REFERENCE)
            drawn = figures.forest(comparison.forest_points(rows), title, reference=reference)
    assert drawn is not None
    done.add(
        Section("Is the gate worth it?", _WORTH, tables),
        (
            f"{task}_comparison",
            drawn,
            "Dots are test scores, lines their 95 % intervals, the grey band the interval of the uniform mean; "
            "the paired differences in the table are sharper than overlapping intervals suggest.",
        ),
    )


def _gate(done: Evaluation, test: Predictions, task: str, classes: Sequence[str], bootstrap: Bootstrap) -> None:
    assert test.weights is not None
    report = gates.diagnose(
        test.weights,
        test.present,
        test.labels[task],
        len(classes),
        test.degraded,
        test.modalities,
        bootstrap,
        test.unimodal_logits,
    )
    rows = []
    for name in test.modalities:
        done.put(f"test/gate/weight_{name}", report.by_modality[name])
        cells = [name, number(report.by_modality[name].value), bounds(report.by_modality[name], False)]
        for kind, found in (("severity", report.with_severity), ("right", report.with_right)):
            one = found.get(name)
            if one is None or math.isnan(one.value):
                cells.append("n/a")
                continue
            done.put(f"test/gate/correlation_{kind}_{name}", one)
            cells.append(f"{one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f})")
        rows.append(cells)
    done.put("test/gate/entropy", report.entropy)
    done.put("test/gate/collapse", report.collapse)
    text = [
        f"Entropy of the weights relative to uniform is {number(report.entropy.value, 2)} (1: all alike, 0: one "
        f"modality alone); in {percent(report.collapse.value)} of the clips one modality takes more than "
        f"{percent(gates.COLLAPSED, 0)} of the weight."
    ]
    columns = ["modality", "mean weight", "95 % interval", "correlation with severity", "correlation with being right"]
    caption = (
        "A gate that works has a negative correlation with the severity of degradation of its modality, and a "
        "positive one with that modality's own head being right."
    )
    drawn = [
        (
            f"{task}_gate_by_class",
            figures.gate_by_class(report.by_class, classes, test.modalities),
            "Bars that differ between classes show that the gate follows what happens in the clip; equal bars, that "
            "it has learned fixed weights.",
        )
    ]
    if any(len(bins) > 1 for bins in report.by_severity.values()):
        drawn.append(
            (
                f"{task}_gate_by_severity",
                figures.gate_by_severity(report),
                "Each line should fall: the more a modality is degraded (0: not at all, 1: useless), the less weight "
                "it should get.",
            )
        )
    done.add(Section("What the gate does", text, [Table(columns, rows, caption)]), *drawn)
