"""The report of a study: tables, figures with a sentence on how to read each, and the same as markdown for docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from crossgate.evaluation import classification, study_figures, study_tables
from crossgate.evaluation.comparison import REFERENCE, TITLES
from crossgate.evaluation.evaluation import Drawn, Evaluation
from crossgate.evaluation.report import Section
from crossgate.evaluation.results import metric_name
from crossgate.evaluation.study import ORACLE, StudyRow, lucky_oracle
from crossgate.evaluation.study_findings import Findings
from crossgate.evaluation.tables import Table, bounds, p_value, percent, points

ENOUGH = 0.6
"""Share of the gap between uniform averaging and the oracle that a good gate is asked to recover."""

_Draw = Callable[[Findings], list[Drawn]]


def present_study(found: Findings) -> Evaluation:
    """Returns the report of a study."""
    done = Evaluation(summary=summary(found))
    for section, draw in _sections(found):
        done.add(section, *(draw(found) if draw is not None else ()))
    for answer in found.answers:  # the gap's measure, where it is not the table's
        if found.metric != "accuracy":
            done.put(metric_name("test", "study", answer.name, "accuracy"), found.accuracy(answer))
    for line in found.lines.values():
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
    tables = [(section.title, table) for section, _ in _sections(found) for table in section.tables]
    return "\n\n".join([summary(found), *(f"{title}.\n\n{markdown(table)}" for title, table in tables)]) + "\n"


def markdown(table: Table) -> str:
    """A table in markdown, its caption above."""
    rule = ["---:" if table.numeric(i) else "---" for i in range(len(table.columns))]
    body = [table.columns, rule, *table.rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in body)
    return f"{table.caption}\n\n{text}" if table.caption else text


def _sections(found: Findings) -> Iterator[tuple[Section, _Draw | None]]:
    """The parts of the report in their order, each with what draws its figures."""
    title = f"{found.task.capitalize()}: every gate against uniform averaging"
    yield Section(title, [_HOW], [study_tables.every_competitor(found)]), study_figures.of_competitors
    slices = study_tables.slices(found)
    if slices is not None:
        yield Section("Spoiled clips and clean ones", [], [slices]), None
    tables = [study_tables.subsets(found), study_tables.modalities(found)]
    yield Section("What every subset of the modalities reaches", [], tables), study_figures.of_subsets
    if found.reports:
        yield Section("What the weights do", [_WEIGHTS], [study_tables.weights(found)]), study_figures.of_gates
    if found.weighted in found.reports:
        yield Section(f"What {found.weighted} weighs"), study_figures.of_weights
    yield Section("Calibration before and after fusion", [_CALIBRATION]), study_figures.of_calibration
    if found.low_labels:
        title = "Pretrained encoders against random ones, from few labels"
        yield Section(title, [], [study_tables.low_labels(found)]), None
    if found.sweeps:
        yield Section("Noise", [_NOISE], [study_tables.sweeps(found)]), study_figures.of_sweeps


# ---- the summary -----------------------------------------------------------------------------------------------


def summary(found: Findings) -> str:
    """The result in some sentences, said plainly."""
    best, uniform, strongest = found.lines[found.chosen], found.lines[REFERENCE], found.strongest
    difference = best.difference
    assert difference is not None
    if difference.low > 0:
        verdict = "beats uniform averaging"
    elif difference.high < 0:
        verdict = "is worse than uniform averaging"
    else:
        verdict = "is not shown to differ from uniform averaging: the interval includes zero"
    no_gate = "" if best.kind == "gate" else " (no gate)"
    said = [
        f"{found.clips['test']} test clips of {found.groups['test']} groups, {found.clips['train']} training and "
        f"{found.clips['val']} validation clips, {found.seeds} seeds, encoders "
        f"{'pretrained' if found.encoders else 'random'} and frozen. Chance: {percent(_chance(found))} "
        f"{TITLES[found.metric]}.",
        f"The fusion chosen on validation, {found.chosen}{no_gate}, {verdict}: {percent(best.score.value)} against "
        f"{percent(uniform.score.value)}, {points(difference)} points, McNemar p = {p_value(best.mcnemar)}. "
        f"The best single modality is {strongest.name.removesuffix(' alone')} with {percent(strongest.score.value)}.",
        _gap_sentence(found, best),
        _told_sentence(found),
        _ungated_sentence(found),
    ]
    return " ".join(one for one in said if one)


def _chance(found: Findings) -> float:
    if found.positive is not None:
        return float((found.labels == found.positive).mean())
    return max(classification.chance(found.labels, len(found.classes)).values())


def _gap_sentence(found: Findings, best: StudyRow) -> str:
    """How far the chosen fusion goes towards the oracle, and how far luck alone would bring that oracle."""
    uniform, oracle = found.answer(REFERENCE), found.answer(ORACLE)
    if uniform is None or oracle is None:
        return ""
    low, high = (percent(found.accuracy(one).value) for one in (uniform, oracle))
    if best.gap is None:
        text = f"The oracle ({high} accuracy) is not above uniform averaging ({low}): there is no gap to recover."
    else:
        reached = "recovers" if best.gap.value >= ENOUGH else "recovers only"
        text = (
            f"The chosen fusion {reached} {percent(best.gap.value, 0)} ({bounds(best.gap, digits=0)}) of the gap in "
            f"accuracy between uniform averaging ({low}) and the oracle ({high})."
        )
    lucky = percent(lucky_oracle(found.present, len(found.classes)))
    return f"{text} That oracle would reach {lucky} if every head guessed."


def _told_sentence(found: Findings) -> str:
    told = found.lines.get("truth of degradation")
    if told is None or told.difference is None:
        return ""
    return f"A gate that is told which modalities are clean, and averages them, has {points(told.difference)} points."


def _ungated_sentence(found: Findings) -> str:
    """Which fusions differ from the plain mean under the same head: of so many, some do by luck."""
    compared = [line for line in found.lines.values() if line.ungated is not None]
    if not compared:
        return ""
    better = [line.name for line in compared if line.ungated is not None and line.ungated.low > 0]
    worse = sum(line.ungated is not None and line.ungated.high < 0 for line in compared)
    gates = sum(line.kind == "gate" for line in compared)
    above = f"{', '.join(better) or 'none'} {'are' if len(better) > 1 else 'is'}"
    return (
        f"Of {len(compared)} fusions, {gates} of them gates, {above} above the plain mean of features under a head of "
        f"its own, {worse} below it (95 % intervals, one at a time)."
    )


_HOW = (
    "Encoders are frozen and never saw a label; heads and gates learn on their features. A gate of class scores "
    "learns from those that heads gave to groups which they were not trained on; a fusion of features has a head of "
    "its own. Each is trained with several strengths of modality dropout and of the penalty on uneven weights, and "
    "kept where its log loss on validation groups is lowest; test groups are scored once. Scores are means over "
    "seeds (of folds, heads and gates; the encoders are the same); intervals are 95 %, by bootstrap over groups; SD "
    "is the spread over seeds. p is of the paired difference; McNemar's p counts clips as if they were independent. "
    "Of twenty fusions that are worth nothing one has p below 0.05 by luck: only the one that validation chose is "
    "tested once. The gap is the share of the way from the uniform mean to the oracle, in accuracy: the oracle "
    "picks heads by knowing the label, so it has no line in a table of ranking."
)
_NOISE = "Each modality of every test clip is spoiled in turn; heads and gates have never seen that."
_WEIGHTS = (
    "Correlation of a modality's weight with its known severity (a good gate: below zero) and with its own head being "
    "right (above zero); * where the interval excludes zero. Entropy: 1 is even. Collapsed: one weight above 95 %. "
    "Each is measured seed by seed, and the mean over seeds is shown."
)
_CALIBRATION = "The best single modality, the uniform mean and the fusion that validation chose; answers of all seeds."
