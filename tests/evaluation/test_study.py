"""The arithmetic of a study, against hand-made truth, and its report on simulated gates."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from crossgate.evaluation import Predictions, gates
from crossgate.evaluation.comparison import REFERENCE
from crossgate.evaluation.intervals import Bootstrap, mean
from crossgate.evaluation.study import (
    Answer,
    chosen,
    lucky_oracle,
    mcnemar,
    over_seeds,
    right_of,
    rows,
    shapley,
    subsets,
)
from crossgate.evaluation.study_report import Findings, LowLabels, Sweep, markdown, present_study, study_markdown
from crossgate.evaluation.tables import Table

LABELS = np.array([0, 1, 0, 1, 0, 1, 0, 1])


def says(right: list[int]) -> np.ndarray:
    """Probabilities that are right where the list says 1."""
    classes = np.where(np.array(right) == 1, LABELS, 1 - LABELS)
    return np.eye(2)[classes] * 0.8 + 0.1


def test_mcnemar_counts_only_clips_on_which_both_differ() -> None:
    a, b = says([1, 1, 1, 1, 1, 1, 0, 0]), says([0, 0, 0, 0, 0, 1, 0, 0])
    assert mcnemar([a], [b], LABELS) == pytest.approx(2 * 0.5**5)  # five won, none lost
    assert mcnemar([b], [a], LABELS) == mcnemar([a], [b], LABELS)
    assert mcnemar([a], [a], LABELS) == 1
    assert mcnemar([a, a, b], [b], LABELS) == mcnemar([a], [b], LABELS), "most seeds decide"


def test_scores_are_means_over_seeds_and_differences_are_paired() -> None:
    good, bad = says([1] * 8), says([1, 1, 1, 1, 0, 0, 0, 0])
    answers = [
        Answer(REFERENCE, "average", [bad, bad]),
        Answer("g", "gate", [good, bad]),
        Answer("oracle", "control", [good]),
    ]
    lines = {line.name: line for line in rows(answers, LABELS, Bootstrap(np.arange(8), 200), REFERENCE)}
    assert lines["g"].score.value == 0.75 and lines["g"].spread == pytest.approx(np.std([1, 0.5], ddof=1))
    difference = lines["g"].difference
    assert difference is not None and difference.value == 0.25 and difference.low >= 0, "never worse in any resample"
    assert lines[REFERENCE].difference is None and math.isnan(lines[REFERENCE].mcnemar)
    gap = lines["g"].gap
    assert gap is not None and gap.value == 0.5
    assert lines[REFERENCE].gap is None and lines["oracle"].gap is None
    with pytest.raises(ValueError, match="no entry"):
        rows(answers[1:], LABELS, Bootstrap(np.arange(8)), REFERENCE)


def test_every_gate_is_compared_with_the_mean_of_features_too() -> None:
    good, bad = says([1] * 8), says([1, 1, 1, 1, 0, 0, 0, 0])
    answers = [Answer(REFERENCE, "average", [bad]), Answer("g", "gate", [good]), Answer("mean", "gate", [good])]
    lines = {line.name: line for line in rows(answers, LABELS, Bootstrap(np.arange(8), 200), REFERENCE)}
    ungated = lines["g"].ungated
    assert ungated is not None and ungated.value == 0 and ungated.high == 0, "as good as no gate, whatever the average"
    assert lines[REFERENCE].ungated is None and lines["mean"].ungated is None
    without = rows(answers[:2], LABELS, Bootstrap(np.arange(8), 200), REFERENCE)
    assert all(line.ungated is None for line in without)


def test_several_seeds_resample_together() -> None:
    bootstrap = Bootstrap(np.arange(8), 50)
    one, two = mean(LABELS), mean(1 - LABELS)
    assert np.allclose(bootstrap.distribution(over_seeds([one, two])), 0.5)


def test_shapley_shares_out_the_whole_accuracy() -> None:
    draws = np.random.default_rng(0)
    right = {subset: draws.random(40) for subset in [(), *subsets(3)]}
    values = shapley(right, 3)
    assert np.allclose(values.sum(axis=1), right[0, 1, 2] - right[()])
    worth = np.array([0.1, 0.2, 0.3])
    additive = {subset: np.full(1, worth[list(subset)].sum()) for subset in [(), *subsets(3)]}
    assert np.allclose(shapley(additive, 3), worth), "without interplay each has its own worth"


def test_the_gate_is_chosen_on_validation_and_not_on_test() -> None:
    lucky = Answer("lucky", "gate", [says([1] * 8)], val_loss=[2.0])
    sober = Answer("sober", "gate", [says([0] * 8)], val_loss=[1.0])
    assert chosen([lucky, sober, Answer("x", "control", [])]).name == "sober"
    with pytest.raises(ValueError, match="no gate"):
        chosen([Answer(REFERENCE, "average", [])])


def test_weights_that_differ_by_absence_alone_do_not_vary() -> None:
    present = np.array([[True, True], [True, True], [True, False]])
    constant = np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    assert not gates.varies(constant, present)
    assert gates.varies(constant + np.array([[0.1, -0.1], [0, 0], [0, 0]]), present)


def test_guessing_heads_make_a_lucky_oracle() -> None:
    present = np.array([[True, True], [True, False]])
    assert lucky_oracle(present, 2) == pytest.approx((0.75 + 0.5) / 2)
    draws = np.random.default_rng(1)
    unimodal, labels = draws.normal(size=(20000, 2, 4)), draws.integers(4, size=20000)
    there = np.ones((20000, 2), bool)
    right = gates.oracle(unimodal, there, labels).argmax(axis=1) == labels
    assert right.mean() == pytest.approx(lucky_oracle(there, 4), abs=0.02)


def findings(simulate: Callable[..., Predictions], skill: float = 1.0) -> Findings:
    """A study of a gate that knows the degradation, two seeds."""
    clips = simulate(480, 1, skill=skill)
    labels, present = clips.labels["action"], clips.present
    unimodal, weights = clips.unimodal_logits, clips.weights
    assert unimodal is not None and weights is not None
    spoiled = np.nan_to_num(clips.degraded)[:, :, None]  # a spoiled stream is sure of something wrong
    unimodal = unimodal + 6 * spoiled * np.random.default_rng(0).normal(size=unimodal.shape)
    uniform = gates.uniform_probabilities(unimodal, present)
    gated = gates.mix_probabilities(gates.shares(weights**2, present), unimodal)
    alone = [gates.single(unimodal, present, m, np.full(5, 0.2)) for m in range(4)]
    answers = [Answer(f"{name} alone", "modality", [alone[m]] * 2) for m, name in enumerate(clips.modalities)]
    answers += [
        Answer(REFERENCE, "average", [uniform] * 2),
        Answer("softmax_probabilities", "gate", [gated] * 2, [weights] * 2, [1.0, 1.0]),
        Answer("mean", "gate", [uniform] * 2, [], [2.0, 2.0]),
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
        task="action", names=clips.modalities, classes=[f"class {k}" for k in range(5)], positive=None, labels=labels,
        present=present, degraded=clips.degraded, unimodal=[unimodal] * 2, clips={"train": 1, "val": 1, "test": 480},
        groups={"test": 120}, bootstrap=Bootstrap(clips.group, 200), answers=answers, chosen="softmax_probabilities",
        weighted="softmax_probabilities", subsets=shown, prior=np.full(5, 0.2), sweeps=[sweep], low_labels=few,
        seeds=2, encoders="",
    )  # fmt: skip


def test_the_report_says_that_a_gate_that_knows_helps(simulated: Callable[..., Predictions]) -> None:
    done = present_study(findings(simulated))
    assert "beats uniform averaging" in done.summary and "test clips of 120 groups" in done.summary
    assert {"study", "severity", "noise", "subsets", "shapley"} <= done.figures.keys()
    rows = [label.get_text() for label in done.figures["subsets"].axes[0].get_yticklabels()]
    assert len(rows) == 16 and rows[0].startswith("none") and rows[-1] == "rgb + flow + audio + depth"
    (section,) = (one for one in done.sections if one.title.startswith("What every subset"))
    assert len(section.figures) == 2 and all(how for _, how in section.figures)
    name = "test/study/softmax_probabilities"
    assert done.metrics[f"{name}/over_uniform_low"] > 0 and 0 < done.metrics[f"{name}/gap_recovered"] <= 1
    assert done.metrics[f"{name}/over_mean_of_features_low"] > 0
    assert "Of 1 gates, softmax_probabilities is above the plain mean of features" in done.summary
    assert done.metrics["test/study/oracle/accuracy"] > done.metrics["test/study/uniform_mean/accuracy"]
    text = study_markdown(findings(simulated))
    assert "**softmax_probabilities**" in text and "| rgb + flow + audio + depth |" in text
    negative = [line for line in text.splitlines() if line.startswith("| softmax_probabilities | -")]
    assert negative and negative[0].count("*") >= 4, "the weights fall with the severity of every modality"


def test_the_report_says_plainly_that_there_is_nothing_to_gain(simulated: Callable[..., Predictions]) -> None:
    assert "is not shown to differ" in present_study(findings(simulated, skill=0.0)).summary


def test_markdown_aligns_numbers() -> None:
    text = markdown(Table(["a", "b"], [["x", "1.0"]], "c"))
    assert text.splitlines() == ["c", "", "| a | b |", "| --- | ---: |", "| x | 1.0 |"]
