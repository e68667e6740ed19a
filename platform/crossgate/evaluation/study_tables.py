"""The tables of a study."""

from __future__ import annotations

import math

import numpy as np

from crossgate.evaluation.comparison import REFERENCE, TITLES, statistic
from crossgate.evaluation.intervals import Interval, mean, over_seeds
from crossgate.evaluation.study import ORACLE, shapley
from crossgate.evaluation.study_findings import Findings, LowLabels
from crossgate.evaluation.tables import Table, bounds, number, p_value, percent, points

_LABELS = (
    "Uniform averaging of heads on frozen encoders; a random draw of the labels a seed, at least one clip a class; "
    "validation, which stops the heads, keeps all its labels"
)


def every_competitor(found: Findings) -> Table:
    """A line a competitor: its score, and its difference to the uniform mean."""
    lines, title = found.lines.values(), TITLES[found.metric]
    columns = ["model", "what", title, "95 %", "SD", "points over the mean", "p", "McNemar p", "NLL", "ECE"]
    compared = any(line.ungated is not None for line in lines)
    columns += ["gap in accuracy", *(["points over the mean of features"] if compared else [])]
    cells = [
        [
            f"**{line.name}**" if line.name == found.chosen else line.name,
            f"{line.kind}: {line.note}" if line.note else line.kind,
            percent(line.score.value),
            bounds(line.score),
            "" if math.isnan(line.spread) else f"{100 * line.spread:.1f}",
            "" if line.difference is None else points(line.difference),
            "" if line.difference is None else p_value(line.difference.p),
            "" if math.isnan(line.mcnemar) else p_value(line.mcnemar),
            number(line.nll.value, 2),
            number(line.ece, 3),
            "" if line.gap is None else percent(line.gap.value, 0),
            *(["" if line.ungated is None else points(line.ungated)] if compared else []),
        ]
        for line in lines
    ]
    return Table(columns, cells, f"{found.task} on the test groups; bold: the fusion that validation prefers")


def slices(found: Findings) -> Table | None:
    """Accuracy where a modality is known to be spoiled or missing, and where all is well."""
    spoiled = (np.nan_to_num(found.degraded) > 0).any(axis=1) | ~found.present.all(axis=1)
    known = np.isfinite(found.degraded).any(axis=1)
    if not known.any() or not spoiled.any() or spoiled.all():
        return None
    table = Table(["model", "accuracy, spoiled", "95 %, spoiled", "accuracy, clean", "95 %, clean"])
    shown = [REFERENCE, found.chosen, found.weighted, "truth of degradation", ORACLE]
    for answer in found.answers:
        if answer.name in shown:
            cells = [answer.name]
            for part in (spoiled, ~spoiled):
                right = [np.where(part, one.argmax(axis=1) == found.labels, np.nan) for one in answer.test]
                interval = found.bootstrap.interval(over_seeds([mean(one) for one in right]))
                cells += [percent(interval.value), bounds(interval)]
            table.rows.append(cells)
    table.caption = f"{int(spoiled.sum())} test clips have a spoiled or missing modality, {int((~spoiled).sum())} none"
    return table


def subsets(found: Findings) -> Table:
    """What each set of modalities reaches."""
    table = Table(["modalities", *found.subsets], caption="Accuracy when only these modalities are given")
    for name, intervals in accuracy_of_subsets(found).items():
        table.rows.append([name, *(f"{percent(one.value)} ({bounds(one)})" for one in intervals.values())])
    return table


def accuracy_of_subsets(found: Findings) -> dict[str, dict[str, Interval]]:
    """Subset of the modalities -> competitor -> accuracy."""
    return {
        " + ".join(found.names[m] for m in subset) or "none (the commonest class)": {
            model: found.bootstrap.interval(mean(right[subset])) for model, right in found.subsets.items()
        }
        for subset in next(iter(found.subsets.values()))
    }


def shares_of_modalities(found: Findings) -> dict[str, dict[str, Interval]]:
    """Modality -> competitor -> Shapley value."""
    values = {model: shapley(right, len(found.names)) for model, right in found.subsets.items()}
    return {
        name: {model: found.bootstrap.interval(mean(one[:, m])) for model, one in values.items()}
        for m, name in enumerate(found.names)
    }


def modalities(found: Findings) -> Table:
    """What each modality adds."""
    table = Table(["modality", *found.subsets], caption="Shapley value: each modality's share of the accuracy, points")
    for name, intervals in shares_of_modalities(found).items():
        table.rows.append([name, *(f"{100 * one.value:+.1f} ({bounds(one)})" for one in intervals.values())])
    return table


def weights(found: Findings) -> Table:
    """A line a gate whose weights vary: correlations with severity and with being right, evenness, collapse."""
    severity = [f"severity, {name}" for name in found.names]
    right = [f"right, {name}" for name in found.names]
    table = Table(["gate", *severity, *right, "entropy", "collapsed"])
    for gate, report in found.reports.items():
        cells = [_correlation(report.with_severity.get(name)) for name in found.names]
        cells += [_correlation(report.with_right.get(name)) for name in found.names]
        table.rows.append([gate, *cells, number(report.entropy.value, 2), percent(report.collapse.value, 0)])
    empty = [i for i in range(1, len(table.columns)) if all(row[i] == "" for row in table.rows)]
    table.columns = [name for i, name in enumerate(table.columns) if i not in empty]
    table.rows = [[cell for i, cell in enumerate(row) if i not in empty] for row in table.rows]
    return table


def _correlation(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.value):
        return ""
    return f"{interval.value:+.2f}{'*' if interval.excludes_zero else ''}"


def sweeps(found: Findings) -> Table:
    """A line a severity of each kind of noise."""
    first = found.sweeps[0]
    columns = ["spoiled", "by", "severity", *first.right, f"weight by {first.gate}"]
    table = Table(columns, caption="Accuracy when one modality of every test clip is spoiled")
    for sweep in found.sweeps:
        for place, severity in enumerate(sweep.severities):
            right = [percent(float(one[place].mean())) for one in sweep.right.values()]
            weight = sweep.weight[place]
            known = number(float(np.nanmean(weight)), 2) if np.isfinite(weight).any() else ""
            table.rows.append([sweep.modality, sweep.kind, f"{severity:.2f}", *right, known])
    return table


def low_labels(found: Findings) -> Table:
    """A line a share of the labels."""
    title = TITLES[found.metric]
    columns = ["labels", "clips", f"{title}, pretrained", f"{title}, random", "points"]
    table = Table(columns, caption=_LABELS)
    by_share: dict[float, dict[str, LowLabels]] = {}
    for one in found.low_labels:
        by_share.setdefault(one.share, {})[one.encoders] = one
    for share, both in by_share.items():
        scored = {
            name: over_seeds([statistic(found.metric, p, found.labels, found.positive) for p in one.test])
            for name, one in both.items()
        }
        cells = [found.bootstrap.interval(scored[name]) for name in ("pretrained", "random")]
        gained = found.bootstrap.difference(scored["pretrained"], scored["random"])
        shown = [f"{percent(one.value)} ({bounds(one)})" for one in cells]
        table.rows.append([percent(share, 0), str(both["pretrained"].clips), *shown, points(gained)])
    return table
