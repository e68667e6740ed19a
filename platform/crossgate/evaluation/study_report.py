"""The report of a study: tables, figures with a sentence on how to read each, and the same as markdown for docs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crossgate.evaluation import classification, gates
from crossgate.evaluation.comparison import REFERENCE, TITLES, hue, statistic
from crossgate.evaluation.evaluation import Evaluation
from crossgate.evaluation.figures import Point, compared, forest, gate_by_severity
from crossgate.evaluation.intervals import Bootstrap, Interval, mean
from crossgate.evaluation.report import Section
from crossgate.evaluation.results import metric_name
from crossgate.evaluation.study import Answer, StudyRow, Subset, lucky_oracle, over_seeds, rows, shapley
from crossgate.evaluation.style import ACCENT, INK, colour, new, styled
from crossgate.evaluation.tables import Table, bounds, number, p_value, percent, points

Array = NDArray[Any]

ENOUGH = 0.6
"""Share of the gap between uniform averaging and the oracle that a good gate is asked to recover."""


@dataclass(frozen=True)
class Sweep:
    """One modality spoiled by one kind of noise.

    Attributes:
        modality, kind: what is spoiled, and how.
        severities: L levels, the first 0.
        right: competitor -> L arrays ``(N,)``, share of seeds that are right.
        gate: whose weights these are.
        weight: L arrays ``(N,)``, its mean weight of the spoiled modality, NaN where a clip lacks it.
    """

    modality: str
    kind: str
    severities: tuple[float, ...]
    right: dict[str, list[Array]]
    gate: str
    weight: list[Array]


@dataclass(frozen=True)
class LowLabels:
    """Uniform averaging of heads trained on a share of the labels: one array of probabilities a seed."""

    encoders: str
    share: float
    clips: int
    test: list[Array]


@dataclass
class Findings:
    """All that a study found out about one corpus and task.

    Attributes:
        unimodal: ``(N, M, K)`` scores of the heads, one a seed.
        clips, groups: part of the data -> how many labelled ones.
        chosen: the gate that validation prefers. weighted: of those that weigh probabilities clip by clip.
        subsets: competitor -> subset -> ``(N,)`` share of seeds that are right.
        encoders: where they came from, empty for random ones.
    """

    task: str
    names: tuple[str, ...]
    classes: Sequence[str]
    positive: int | None
    labels: Array
    present: Array
    degraded: Array
    unimodal: list[Array]
    clips: dict[Any, int]
    groups: dict[Any, int]
    bootstrap: Bootstrap
    answers: list[Answer]
    chosen: str
    weighted: str
    subsets: Mapping[str, Mapping[Subset, Array]]
    prior: Array
    sweeps: list[Sweep]
    low_labels: list[LowLabels]
    seeds: int
    encoders: str

    @property
    def metric(self) -> str:
        """What the table is about."""
        return "accuracy" if self.positive is None else "average_precision"

    def table(self) -> list[StudyRow]:
        """Every competitor against the uniform mean."""
        return rows(self.answers, self.labels, self.bootstrap, REFERENCE, self.metric, self.positive)


def present_study(found: Findings) -> Evaluation:
    """Returns the report of a study."""
    done = Evaluation()
    lines = found.table()
    by_name = {line.name: line for line in lines}
    done.summary = summary(found, by_name)
    title = TITLES[found.metric]
    main = Section(f"{found.task.capitalize()}: every gate against uniform averaging", [_HOW], [_table(found, lines)])
    done.add(main, ("study", forest(_points(lines), f"{found.task}: {title}"), _FOREST))
    for section in _details(found):
        done.add(section, *(_subset_figures(found) if section.title == _SUBSETS else ()))
    report = _diagnosed(found, next(answer for answer in found.answers if answer.name == found.weighted))
    if report is not None and report.with_severity:
        section = Section(f"The weights of {found.weighted} and the known severity of what they weigh")
        done.add(section, ("severity", gate_by_severity(report), _SEVERITY))
    if found.sweeps:
        done.add(Section("Noise", [_NOISE], [_sweep_table(found)]), ("noise", _sweep_figure(found), _SWEEP))
    for line in lines:
        done.put(metric_name("test", "study", line.name, found.metric), line.score)
        if line.difference is not None:
            done.put(metric_name("test", "study", line.name, "over_uniform"), line.difference)
            if line.name == found.chosen:
                done.put(metric_name("test", "study", "over_uniform"), line.difference)
        if line.gap is not None:
            done.put(metric_name("test", "study", line.name, "gap_recovered"), line.gap)
        if line.ungated is not None:
            done.put(metric_name("test", "study", line.name, "over_mean_of_features"), line.ungated)
    return done


def study_markdown(found: Findings) -> str:
    """Returns the study as markdown: the summary and every table."""
    lines = found.table()
    parts = [summary(found, {line.name: line for line in lines}), markdown(_table(found, lines))]
    parts += [f"{section.title}.\n\n{markdown(table)}" for section in _details(found) for table in section.tables]
    if found.sweeps:
        parts.append(f"Noise.\n\n{markdown(_sweep_table(found))}")
    return "\n\n".join(parts) + "\n"


def markdown(table: Table) -> str:
    """A table in markdown, its caption above."""
    rule = ["---:" if table.numeric(i) else "---" for i in range(len(table.columns))]
    body = [table.columns, rule, *table.rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in body)
    return f"{table.caption}\n\n{text}" if table.caption else text


def summary(found: Findings, by_name: Mapping[str, StudyRow]) -> str:
    """The result in some sentences, said plainly."""
    best, uniform = by_name[found.chosen], by_name[REFERENCE]
    streams = [line for line in by_name.values() if line.kind == "modality"]
    strongest = max(streams, key=lambda line: line.score.value)
    chance = _chance(found)
    difference = best.difference
    assert difference is not None
    if difference.low > 0:
        verdict = "beats uniform averaging"
    elif difference.high < 0:
        verdict = "is worse than uniform averaging"
    else:
        verdict = "is not shown to differ from uniform averaging: the interval includes zero"
    title = TITLES[found.metric]
    said = [
        f"{found.clips['test']} test clips of {found.groups['test']} groups, {found.clips['train']} training and "
        f"{found.clips['val']} validation clips, {found.seeds} seeds, encoders "
        f"{'pretrained' if found.encoders else 'random'} and frozen. Chance: {percent(chance)} {title}.",
        f"The gate chosen on validation, {found.chosen}, {verdict}: {percent(best.score.value)} against "
        f"{percent(uniform.score.value)}, {points(difference)} points, McNemar p = {p_value(best.mcnemar)}. "
        f"The best single modality is {strongest.name.removesuffix(' alone')} with {percent(strongest.score.value)}.",
        _gap_sentence(found, by_name),
        _ungated_sentence(by_name),
    ]
    return " ".join(one for one in said if one)


def _chance(found: Findings) -> float:
    if found.positive is not None:
        return float((found.labels == found.positive).mean())
    return max(classification.chance(found.labels, len(found.classes)).values())


def _gap_sentence(found: Findings, by_name: Mapping[str, StudyRow]) -> str:
    gap, oracle = by_name[found.chosen].gap, by_name.get("oracle")
    if gap is None or oracle is None or math.isnan(gap.value):
        return ""
    reached = "recovers" if gap.value >= ENOUGH else "recovers only"
    text = (
        f"It {reached} {percent(gap.value, 0)} ({bounds(gap, digits=0)}) of the gap between uniform averaging and the "
        f"oracle ({percent(oracle.score.value)})."
    )
    if found.positive is None:
        lucky = lucky_oracle(found.present, len(found.classes))
        text += f" That oracle would reach {percent(lucky)} if every head guessed."
    told = by_name.get("truth of degradation")
    if told is not None and told.difference is not None:
        text += f" A gate that is told which modalities are clean, and averages them, has {points(told.difference)}."
    return text


def _ungated_sentence(by_name: Mapping[str, StudyRow]) -> str:
    """Which gates differ from no gate under the same head: of so many, some do by luck."""
    compared = [line for line in by_name.values() if line.ungated is not None]
    if not compared:
        return ""
    better = [line.name for line in compared if line.ungated is not None and line.ungated.low > 0]
    worse = sum(line.ungated is not None and line.ungated.high < 0 for line in compared)
    above = f"{', '.join(better) or 'none'} {'are' if len(better) > 1 else 'is'}"
    return (
        f"Of {len(compared)} gates, {above} above the plain mean of features under a head of its own, {worse} "
        "below it (95 % intervals, one at a time)."
    )


# ---- tables ----------------------------------------------------------------------------------------------------


def _table(found: Findings, lines: Sequence[StudyRow]) -> Table:
    title = TITLES[found.metric]
    columns = ["model", "what", title, "95 %", "SD", "points over the mean", "p", "McNemar p", "NLL", "ECE", "gap"]
    compared = any(line.ungated is not None for line in lines)
    columns += ["points over the mean of features"] if compared else []
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
    return Table(columns, cells, f"{found.task} on the test groups; bold: the gate that validation prefers")


def _details(found: Findings) -> Iterator[Section]:
    slices = _slices(found)
    if slices is not None:
        yield Section("Spoiled clips and clean ones", [], [slices])
    yield Section(_SUBSETS, [], [_subset_table(found), _shapley_table(found)])
    behaviour = _behaviour(found)
    if behaviour.rows:
        yield Section("What the weights do", [_WEIGHTS], [behaviour])
    if found.low_labels:
        yield Section("Pretrained encoders against random ones, from few labels", [], [_label_table(found)])


def _slices(found: Findings) -> Table | None:
    """Accuracy where a modality is known to be spoiled or missing, and where all is well."""
    spoiled = (np.nan_to_num(found.degraded) > 0).any(axis=1) | ~found.present.all(axis=1)
    known = np.isfinite(found.degraded).any(axis=1)
    if not known.any() or not spoiled.any() or spoiled.all():
        return None
    table = Table(["model", "accuracy, spoiled", "95 %, spoiled", "accuracy, clean", "95 %, clean"])
    shown = [REFERENCE, found.chosen, found.weighted, "truth of degradation", "oracle"]
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


def _subset_table(found: Findings) -> Table:
    table = Table(["modalities", *found.subsets], caption="Accuracy when only these modalities are given")
    for name, intervals in _of_subsets(found).items():
        table.rows.append([name, *(f"{percent(one.value)} ({bounds(one)})" for one in intervals.values())])
    return table


def _of_subsets(found: Findings) -> dict[str, dict[str, Interval]]:
    """Subset of the modalities -> competitor -> accuracy."""
    return {
        " + ".join(found.names[m] for m in subset) or "none (the commonest class)": {
            model: found.bootstrap.interval(mean(right[subset])) for model, right in found.subsets.items()
        }
        for subset in next(iter(found.subsets.values()))
    }


def _of_modalities(found: Findings) -> dict[str, dict[str, Interval]]:
    """Modality -> competitor -> Shapley value."""
    values = {model: shapley(right, len(found.names)) for model, right in found.subsets.items()}
    return {
        name: {model: found.bootstrap.interval(mean(one[:, m])) for model, one in values.items()}
        for m, name in enumerate(found.names)
    }


def _subset_figures(found: Findings) -> list[tuple[str, Figure, str]]:
    hues = dict(zip(found.subsets, _HUES))
    reached, shares = compared(_of_subsets(found), hues, "accuracy"), _of_modalities(found)
    return [
        ("subsets", reached, "A gate is worth most where its point lies right of averaging (black) in the same row."),
        ("shapley", compared(shares, hues, "Shapley value"), "Further right: more of the accuracy is this modality's."),
    ]


def _shapley_table(found: Findings) -> Table:
    table = Table(["modality", *found.subsets], caption="Shapley value: each modality's share of the accuracy, points")
    for name, intervals in _of_modalities(found).items():
        table.rows.append([name, *(f"{100 * one.value:+.1f} ({bounds(one)})" for one in intervals.values())])
    return table


def _behaviour(found: Findings) -> Table:
    """A line a gate with weights: correlations with severity and with being right, evenness, collapse."""
    severity = [f"severity, {name}" for name in found.names]
    right = [f"right, {name}" for name in found.names]
    table = Table(["gate", *severity, *right, "entropy", "collapsed"])
    for answer in found.answers:
        varies = any(gates.varies(one, found.present) for one in answer.weights)
        report = _diagnosed(found, answer) if answer.kind == "gate" and varies else None
        if report is None:
            continue
        cells = [_correlation(report.with_severity.get(name)) for name in found.names]
        cells += [_correlation(report.with_right.get(name)) for name in found.names]
        table.rows.append([answer.name, *cells, number(report.entropy.value, 2), percent(report.collapse.value, 0)])
    empty = [i for i in range(1, len(table.columns)) if all(row[i] == "" for row in table.rows)]
    table.columns = [name for i, name in enumerate(table.columns) if i not in empty]
    table.rows = [[cell for i, cell in enumerate(row) if i not in empty] for row in table.rows]
    return table


def _diagnosed(found: Findings, answer: Answer) -> gates.GateReport | None:
    if not answer.weights:
        return None
    weights, scores = np.mean(answer.weights, axis=0), np.mean(found.unimodal, axis=0)
    classes = len(found.classes)
    return gates.diagnose(
        weights, found.present, found.labels, classes, found.degraded, found.names, found.bootstrap, scores
    )


def _correlation(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.value):
        return ""
    sure = math.isfinite(interval.low) and (interval.low > 0 or interval.high < 0)
    return f"{interval.value:+.2f}{'*' if sure else ''}"


def _sweep_table(found: Findings) -> Table:
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


def _label_table(found: Findings) -> Table:
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


# ---- figures ---------------------------------------------------------------------------------------------------


def _points(lines: Sequence[StudyRow]) -> list[Point]:
    return [Point(line.name, line.score, hue(line.name, line.kind)) for line in lines]


@styled
def _sweep_figure(found: Findings) -> Figure:
    """A panel a sweep: accuracy over severity for each competitor, and the gate's weight of what is spoiled."""
    figure, panels = new(2.9, columns=len(found.sweeps), width=max(7.4, 1.9 * len(found.sweeps)), sharey=True)
    hues = {name: hue for name, hue in zip(found.sweeps[0].right, _HUES)}
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


_HUES = (INK, ACCENT, "#009e73")
_SUBSETS = "What every subset of the modalities reaches"
_HOW = (
    "Encoders are frozen and never saw a label; heads and gates learn on their features. A gate learns from scores "
    "that heads gave to groups which they were not trained on; its weights are those of the lowest log loss on "
    "validation groups; test groups are scored once. Scores are means over seeds (of folds, heads and gates; the "
    "encoders are the same); intervals are 95 %, by bootstrap over groups; SD is the spread over seeds. p is of the "
    "paired difference; McNemar's p counts clips as if they were independent. Of twenty gates that are worth nothing "
    "one has p below 0.05 by luck: only the gate that validation chose is tested once. The gap is the share of the "
    "way from the uniform mean to the oracle."
)
_FOREST = (
    "A point is a mean over seeds, a bar its 95 % interval over groups: gates blue, averages black, controls grey."
)
_NOISE = "Each modality of every test clip is spoiled in turn; heads and gates have never seen that."
_SWEEP = "A good gate's dashed line falls, and its accuracy falls less than that of the uniform mean (black)."
_LABELS = (
    "Uniform averaging of heads on frozen encoders; a random draw of the labels a seed, at least one clip a class; "
    "validation, which stops the heads, keeps all its labels"
)
_SEVERITY = "A good gate's lines fall: the worse a modality, the less it counts."
_WEIGHTS = (
    "Correlation of a modality's weight with its known severity (a good gate: below zero) and with its own head being "
    "right (above zero); * where the interval excludes zero. Entropy: 1 is even. Collapsed: one weight above 95 %."
)
