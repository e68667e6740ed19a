"""The report of a study on simulated gates: what is true is said, drawn and put into numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from crossgate.evaluation import Predictions, gates, style
from crossgate.evaluation.comparison import REFERENCE
from crossgate.evaluation.intervals import Bootstrap
from crossgate.evaluation.study import Answer, lucky_oracle, right_of, subsets
from crossgate.evaluation.study_figures import behaviour
from crossgate.evaluation.study_findings import Findings, LowLabels, Sweep
from crossgate.evaluation.study_report import markdown, present_study, study_markdown
from crossgate.evaluation.tables import Table


def findings(simulate: Callable[..., Predictions], skill: float = 1.0, classes: int = 5) -> Findings:
    """A study of a gate that knows the degradation and of one that takes one modality, another each seed; two seeds.

    Two classes make a task with a positive class.
    """
    clips = simulate(480, 1, classes, skill=skill)
    labels, present = clips.labels["action"], clips.present
    unimodal, weights = clips.unimodal_logits, clips.weights
    assert unimodal is not None and weights is not None
    spoiled = np.nan_to_num(clips.degraded)[:, :, None]  # a spoiled stream is sure of something wrong
    unimodal = unimodal + 6 * spoiled * np.random.default_rng(0).normal(size=unimodal.shape)
    prior = np.full(classes, 1 / classes)
    uniform = gates.uniform_probabilities(unimodal, present)
    gated = gates.mix_probabilities(gates.shares(weights**2, present), unimodal)
    alone = [gates.single(unimodal, present, m, prior) for m in range(4)]
    first = (np.arange(480) % 7 == 0)[:, None]  # a few clips give all to another one, or its weights would not vary
    greedy = [np.where(first, np.eye(4)[1 - m], np.eye(4)[m]) for m in (0, 1)]
    answers = [Answer(f"{name} alone", "modality", [alone[m]] * 2) for m, name in enumerate(clips.modalities)]
    answers += [
        Answer(REFERENCE, "average", [uniform] * 2),
        Answer("softmax_probabilities", "gate", [gated] * 2, [weights] * 2, [1.0, 1.0]),
        Answer("greedy", "gate", [uniform] * 2, greedy, [3.0, 3.0]),
        Answer("concat", "fusion", [uniform] * 2, [], [4.0, 4.0]),
        Answer("mean", "average", [uniform] * 2, [], [2.0, 2.0]),
        Answer("oracle", "control", [gates.oracle(unimodal, present, labels)] * 2),
    ]
    right = {(): (labels == 0).astype(float)}
    for subset in subsets(4):
        seen = present & np.isin(np.arange(4), subset)
        right[subset] = right_of([gates.uniform_probabilities(unimodal, seen)], labels)
    shown = {REFERENCE: right}
    level = right_of([uniform], labels)
    right_of_mean = {REFERENCE: [level, level / 2]}
    sweep = Sweep("rgb", "dark", (0.0, 1.0), right_of_mean, "softmax_probabilities", [weights[:, 0]] * 2)
    few = [LowLabels(which, share, 10, [uniform]) for share in (0.1, 1.0) for which in ("pretrained", "random")]
    return Findings(
        task="action", names=clips.modalities, classes=[f"class {k}" for k in range(classes)],
        positive=0 if classes == 2 else None, labels=labels,
        present=present, degraded=clips.degraded, unimodal=[unimodal] * 2, clips={"train": 1, "val": 1, "test": 480},
        groups={"test": 120}, bootstrap=Bootstrap(clips.group, 200), answers=answers, chosen="softmax_probabilities",
        weighted="softmax_probabilities", subsets=shown, sweeps=[sweep], low_labels=few,
        seeds=2, encoders="",
    )  # fmt: skip


def test_the_report_says_that_a_gate_that_knows_helps(simulated: Callable[..., Predictions]) -> None:
    done = present_study(findings(simulated))
    assert "beats uniform averaging" in done.summary and "test clips of 120 groups" in done.summary
    drawn = {"study", "subsets", "shapley", "gates", "weights", "weights_by_class", "severity", "calibration", "noise"}
    assert drawn == done.figures.keys()
    assert all(how for section in done.sections for _, how in section.figures)
    assert all(style.svg(figure) for figure in done.figures.values())
    rows = [label.get_text() for label in done.figures["subsets"].axes[0].get_yticklabels()]
    assert len(rows) == 16 and rows[0].startswith("none") and rows[-1] == "rgb + flow + audio + depth"
    name = "test/study/softmax_probabilities"
    assert done.metrics[f"{name}/over_uniform_low"] > 0 and 0 < done.metrics[f"{name}/gap_recovered"] <= 1
    assert done.metrics[f"{name}/over_mean_of_features_low"] > 0
    assert "Of 3 fusions, 2 of them gates, softmax_probabilities is above the plain mean of features" in done.summary
    assert done.metrics["test/study/oracle/accuracy"] > done.metrics["test/study/uniform_mean/accuracy"]
    text = study_markdown(findings(simulated))
    assert "**softmax_probabilities**" in text and "| rgb + flow + audio + depth |" in text
    negative = [line for line in text.splitlines() if line.startswith("| softmax_probabilities | -")]
    assert negative and negative[0].count("*") >= 4, "the weights fall with the severity of every modality"


def test_the_report_says_plainly_that_there_is_nothing_to_gain(simulated: Callable[..., Predictions]) -> None:
    assert "is not shown to differ" in present_study(findings(simulated, skill=0.0)).summary


@pytest.mark.parametrize("classes", [2, 5])
def test_the_gap_is_one_of_accuracy_and_says_what_luck_gives_it(
    simulated: Callable[..., Predictions], classes: int
) -> None:
    found = findings(simulated, classes=classes)
    done = present_study(found)
    low, high, own = (
        done.metrics[f"test/study/{name}/accuracy"] for name in ("uniform_mean", "oracle", "softmax_probabilities")
    )
    assert done.metrics["test/study/softmax_probabilities/gap_recovered"] == pytest.approx((own - low) / (high - low))
    said = f"of the gap in accuracy between uniform averaging ({100 * low:.1f} %) and the oracle ({100 * high:.1f} %)."
    assert said in done.summary
    lucky = 100 * lucky_oracle(found.present, classes)
    assert f"That oracle would reach {lucky:.1f} % if every head guessed." in done.summary


def test_a_task_of_ranking_shows_no_oracle_and_keeps_its_own_score(simulated: Callable[..., Predictions]) -> None:
    found = findings(simulated, classes=2)
    done = present_study(found)
    ranked = [name for name in done.metrics if name.endswith("/average_precision")]
    assert "test/study/uniform_mean/average_precision" in ranked
    assert not [name for name in done.metrics if "oracle" in name and "/oracle/accuracy" not in name]
    table = done.sections[0].tables[0]
    assert "average precision" in table.columns and "oracle" not in [row[0] for row in table.rows]
    over = done.metrics["test/study/softmax_probabilities/over_uniform"]
    scores = [f"test/study/{name}/average_precision" for name in ("softmax_probabilities", "uniform_mean")]
    first, second = (done.metrics[name] for name in scores)
    assert over == pytest.approx(first - second) == done.metrics["test/study/over_uniform"]


def test_an_oracle_that_is_no_better_leaves_no_gap(simulated: Callable[..., Predictions]) -> None:
    found = findings(simulated)
    by_name = {one.name: one for one in found.answers}
    by_name["oracle"].test = by_name[REFERENCE].test
    done = present_study(found)
    assert "there is no gap to recover. That oracle would reach" in done.summary
    assert not [name for name in done.metrics if "gap_recovered" in name]


def test_a_gate_of_one_modality_a_seed_is_collapsed_in_the_table_and_in_the_figure(
    simulated: Callable[..., Predictions],
) -> None:
    found = findings(simulated)
    (section,) = (one for one in present_study(found).sections if one.title == "What the weights do")
    (row,) = (row for row in section.tables[0].rows if row[0] == "greedy")
    assert row[-2:] == ["0.00", "100 %"]
    even, alone, right = behaviour(found.reports, found.names).axes
    assert [label.get_text() for label in even.get_yticklabels()] == ["softmax_probabilities", "greedy"]
    dots = [[float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"] for axes in (even, alone)]
    assert dots[0] == [found.reports[name].entropy.value for name in ("softmax_probabilities", "greedy")]
    assert dots[1][1] == 1 and dots[1][0] < 1
    hollow = {str(line.get_markerfacecolor()) == "none" for line in right.lines if len(line.get_xdata())}
    assert hollow == {True, False}, "filled where the interval excludes zero"


def test_calibration_counts_the_answers_of_every_seed(simulated: Callable[..., Predictions]) -> None:
    found = findings(simulated)
    sure = np.eye(5)[found.labels]
    (gate,) = (one for one in found.answers if one.name == found.chosen)
    gate.test = [sure, np.roll(sure, 1, axis=1)]  # surely right, then surely wrong: averaged, neither
    axes = present_study(found).figures["calibration"].axes[0]
    names = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert set(names) == {found.strongest.name, REFERENCE, found.chosen}
    (curve,) = (line for line in axes.lines if line.get_color() == style.ACCENT and len(line.get_xdata()))
    np.testing.assert_allclose(curve.get_xydata(), [[1.0, 0.5]])


def test_markdown_aligns_numbers() -> None:
    text = markdown(Table(["a", "b"], [["x", "1.0"]], "c"))
    assert text.splitlines() == ["c", "", "| a | b |", "| --- | ---: |", "| x | 1.0 |"]
