"""The figures of a study, each with one sentence on how to read it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crossgate.evaluation import figures
from crossgate.evaluation.comparison import REFERENCE, TITLES, hue
from crossgate.evaluation.evaluation import Drawn
from crossgate.evaluation.gates import COLLAPSED, GateReport
from crossgate.evaluation.study_findings import Findings
from crossgate.evaluation.study_tables import accuracy_of_subsets, shares_of_modalities
from crossgate.evaluation.style import ACCENT, INK, MUTED, colour, new, short, styled
from crossgate.evaluation.tables import percent

_HUES = (INK, ACCENT, "#009e73")
"""Of the uniform mean, the fusion that validation chose, and the one whose weights are shown."""


def of_competitors(found: Findings) -> list[Drawn]:
    """Every competitor's score."""
    points = [figures.Point(one.name, one.score, hue(one.name, one.kind)) for one in found.lines.values()]
    title = f"{found.task}: {TITLES[found.metric]}"
    return [("study", figures.forest(points, title, reference=found.lines[REFERENCE].score), _FOREST)]


def of_subsets(found: Findings) -> list[Drawn]:
    """What each set of modalities reaches, and what each adds."""
    hues = dict(zip(found.subsets, _HUES))
    reached = figures.compared(accuracy_of_subsets(found), hues, "accuracy")
    added = figures.compared(shares_of_modalities(found), hues, "Shapley value")
    return [
        ("subsets", reached, "A gate is worth most where its point lies right of averaging (black) in the same row."),
        ("shapley", added, "Further right: more of the accuracy is this modality's."),
    ]


def of_gates(found: Findings) -> list[Drawn]:
    """What the weights of every gate do."""
    return [("gates", behaviour(found.reports, found.names), _GATES)]


def of_weights(found: Findings) -> list[Drawn]:
    """The weights of one gate: by modality, by class, by severity where that is known."""
    gate, report = found.weighted, found.reports[found.weighted]
    points = [figures.Point(name, one, colour(name)) for name, one in report.by_modality.items()]
    levels = figures.forest(points, f"mean weight by {gate}, of the clips that have the modality")
    (axes,) = levels.axes
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])  # from zero, or even weights would look far apart
    by_class = figures.gate_by_class(report.by_class, found.classes, found.names)
    drawn = [("weights", levels, _LEVELS), ("weights_by_class", by_class, figures.GATE_BY_CLASS)]
    if report.knows_severity:
        drawn.append(("severity", figures.gate_by_severity(report), figures.GATE_BY_SEVERITY))
    return drawn


def of_calibration(found: Findings) -> list[Drawn]:
    """Reliability before fusion (the best single modality), by averaging, and by the fusion that validation chose."""
    # A single modality's own colour may be a gate's.
    hues = {found.strongest.name: MUTED, REFERENCE: INK, found.chosen: ACCENT}
    # Every seed's answers are counted as they are: averaged over seeds they would be those of an ensemble.
    shown = {one.name: (hues[one.name], np.concatenate(one.test)) for one in found.answers if one.name in hues}
    drawn = figures.reliability(shown, np.tile(found.labels, found.seeds))
    return [("calibration", drawn, figures.RELIABILITY)]


def of_sweeps(found: Findings) -> list[Drawn]:
    """Accuracy and weight under noise."""
    return [("noise", _sweeps(found), _SWEEP)]


@styled
def behaviour(reports: Mapping[str, GateReport], modalities: Sequence[str]) -> Figure:
    """A row a gate: entropy, collapse, and each modality's correlation of its weight with its head being right."""
    height = 1.3 + (0.1 + 0.06 * len(modalities)) * max(2, len(reports))
    places = {"width_ratios": [1, 1, 1.5], "wspace": 0.08}
    figure, (even, alone, right) = new(height, columns=3, sharey=True, gridspec_kw=places)
    for row, report in enumerate(reports.values()):
        figures.whiskers(even, [row], [report.entropy], INK, across=False)
        figures.whiskers(alone, [row], [report.collapse], INK, across=False)
        _correlations(right, row, report, modalities)
    even.set(title="entropy", xlim=(-0.05, 1.05), xticks=[0, 0.5, 1], xlabel="1: even weights")
    alone.set(title="collapsed", xlim=(-0.05, 1.05), xticks=[0, 0.5, 1], xlabel="share of clips")
    alone.xaxis.set_major_formatter(figures.PERCENT)
    right.set(title="weight and being right", xlabel="correlation")
    right.axvline(0, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    even.set_yticks(range(len(reports)), [short(name, 34) for name in reports])
    even.set_ylim(len(reports) - 0.4, -0.6)
    for axes in (even, alone, right):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    for name in modalities:
        right.plot([], [], "o", color=colour(name), label=name)
    figure.legend(loc="outside upper right", ncols=len(modalities))
    return figure


def _correlations(axes: Axes, row: int, report: GateReport, modalities: Sequence[str]) -> None:
    """A dot a modality, one below the other, filled where the interval excludes zero."""
    for place, name in enumerate(modalities):
        one = report.with_right.get(name)
        if one is not None:
            at = row + 0.8 * ((place + 0.5) / len(modalities) - 0.5)
            fill = colour(name) if one.excludes_zero else "none"
            axes.plot([one.value], [at], "o", color=colour(name), markerfacecolor=fill, markersize=3.5)


@styled
def _sweeps(found: Findings) -> Figure:
    """A panel a sweep: accuracy over severity for each competitor, and the gate's weight of what is spoiled."""
    figure, panels = new(2.9, columns=len(found.sweeps), width=max(7.4, 1.9 * len(found.sweeps)), sharey=True)
    hues = dict(zip(found.sweeps[0].right, _HUES))
    for axes, sweep in zip(panels, found.sweeps):
        for name, levels in sweep.right.items():
            axes.plot(sweep.severities, [100 * one.mean() for one in levels], color=hues[name], label=name)
        weights = [100 * float(np.nanmean(one)) if np.isfinite(one).any() else math.nan for one in sweep.weight]
        label = f"its weight by {sweep.gate}"
        axes.plot(sweep.severities, weights, color=colour(sweep.modality), linestyle=(0, (3, 2)), label=label)
        axes.set_title(f"{sweep.modality}: {sweep.kind}")
        axes.set(xlabel="severity", xticks=[0, 0.5, 1])
        axes.grid(axis="y")
    panels[0].set_ylabel("per cent")
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


_FOREST = (
    "A point is a mean over seeds, a bar its 95 % interval over groups: gates blue, averages black, controls grey. A "
    "gate is worth something where its bar lies right of averaging (black; the grey band is the uniform mean's "
    "interval); where they overlap, the paired points in the table tell more."
)
_GATES = (
    "Entropy 0 is one modality alone; collapsed is the share of clips in which one takes more than "
    f"{percent(COLLAPSED, 0)} of the weight; a gate that trusts heads where they are right has its dots right of zero, "
    "filled where the 95 % interval excludes zero."
)
_LEVELS = (
    "Further right: the modality counts for more on average; points that lie together say that the gate prefers none "
    "over all clips, not that it treats every clip alike."
)
_SWEEP = "A good gate's dashed line falls, and its accuracy falls less than that of the uniform mean (black)."
