"""The test of a search's winner: finds what is planted, claims nothing where there is nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crossgate.config import EvaluationConfig
from crossgate.evaluation import Predictions, classifier_scores
from crossgate.evaluation.search_figures import importance_figure, importances, parallel_coordinates, schedules
from crossgate.evaluation.selection import Answers, judge

GROUPS, EACH = 40, 5


def answers(skill: float, seed: int, groups: int = GROUPS) -> Answers:
    """Two classes; logits lean to the truth by `skill`."""
    random = np.random.default_rng(seed)
    count = groups * EACH
    labels = np.tile([0, 1], count)[:count]
    logits = random.normal(size=(count, 2))
    logits[np.arange(count), labels] += skill
    keys = np.array([f"clip{i:04d}" for i in range(count)])
    order = random.permutation(count)  # each trial may have its own order of clips
    group = np.repeat(np.arange(groups), EACH)
    return Answers(logits[order].astype(np.float32), labels[order], group[order], keys[order])


def three(skill: float, seed: int) -> dict[int, Answers]:
    return {number: answers(skill, 100 * seed + number) for number in (0, 7, 8)}


def right_share(one: Answers) -> float:
    return float((one.logits.argmax(1) == one.labels).mean())


@pytest.mark.parametrize("metric", ["accuracy", "average_precision"])
def test_a_gate_that_is_better_is_named(metric):
    candidates = {"good": three(3.0, 1), "same": {0: answers(1.0, 3)}}
    found = judge(candidates, three(1.0, 4), "good", metric, 0, average="uniform averaging (mean)")
    assert found.beats and found.p < 0.01 and found.low > 0
    assert found.said.startswith("good beats averaging: +") and "uniform averaging (mean), 3 seeds" in found.said
    assert "other seeds would give +" in found.said
    assert found.metrics()["search/over_averaging/beats"] == 1.0


def test_without_three_seeds_nothing_is_claimed_however_large_the_difference():
    good, reference = three(3.0, 1), three(1.0, 4)
    for count in (1, 2):
        few = judge({"good": dict(list(good.items())[:count])}, reference, "good", "accuracy", None)
        assert few.p < 0.01 and few.low > 0 and not few.beats
        assert few.said.startswith("no gate beat averaging: good has +")
        assert "luck between trainings is not excluded, which takes 3 seeds that count" in few.said


def test_seeds_that_disagree_claim_nothing_and_widen_the_interval():
    reference = three(1.0, 4)
    steady = judge({"good": three(2.0, 1)}, reference, "good", "accuracy", None)
    torn = {0: answers(4.0, 1), 7: answers(1.7, 2), 8: answers(1.3, 3)}
    found = judge({"good": torn}, reference, "good", "accuracy", None)
    assert steady.beats and found.p < 0.05 and not found.beats
    assert found.high - found.low > 1.5 * (steady.high - steady.low)
    assert "other seeds would give -" in found.said


def run_of(skill: float, base: np.ndarray, random: np.random.Generator) -> Answers:
    """One training: its own skill beside the clips' difficulty `base`, and its own noise."""
    count = len(base)
    labels = np.tile([0, 1], count)[:count]
    right = base + skill + 0.5 * random.normal(size=count) > 0
    logits = 2 * np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)]
    return Answers(logits, labels, np.arange(count) // 4, np.array([f"clip{i:05d}" for i in range(count)]))


@pytest.mark.parametrize("counted", [1, 3])
def test_equal_gates_that_differ_from_training_to_training_are_not_called_winners(counted):
    """Ten equal gates, two points of accuracy from run to run, 250 groups: groups alone named one in half of all."""
    named, by_groups, replications = 0, 0, 60
    for replication in range(replications):
        random = np.random.default_rng(replication)
        base = 0.6 + random.normal(size=1000) + np.repeat(0.3 * random.normal(size=250), 4)
        gates = {
            f"gate{k}": {s: run_of(0.06 * random.normal(), base, random) for s in range(counted)} for k in range(10)
        }
        reference = {s: run_of(0.06 * random.normal(), base, random) for s in range(counted)}
        winner = max(gates, key=lambda name: sum(map(right_share, gates[name].values())))
        found = judge(gates, reference, winner, "accuracy", None, resamples=200, seed=replication)
        named += found.beats
        lone = judge({winner: {0: gates[winner][0]}}, {0: reference[0]}, winner, "accuracy", None, resamples=200)
        by_groups += lone.p < 0.05
    assert named <= 0.05 * replications, f"{named} of {replications}"
    assert by_groups > 0.2 * replications  # else this test could not fail


def test_what_cannot_be_measured_is_said_to_be_so():
    known, few = three(3.0, 1), {0: answers(3.0, 1, groups=4)}
    found = judge({"good": few}, {0: answers(1.0, 4, groups=4)}, "good", "accuracy", None)
    assert found.said == "no gate beat averaging: 4 validation groups are too few for a test"
    none = {seed: replace(one, labels=np.zeros_like(one.labels)) for seed, one in known.items()}
    found = judge({"good": none}, none, "good", "average_precision", 1)
    assert found.said == "no gate beat averaging: average precision is undefined on these validation clips"
    assert found.metrics() == {"search/over_averaging/beats": 0.0}


def test_what_is_no_gate_beats_nothing_and_is_called_what_it_is():
    found = judge({"concat": three(3.0, 1)}, three(1.0, 4), "concat", "accuracy", None, no_gate="the fusion concat")
    assert not found.beats and found.p < 0.01
    assert found.said.startswith(
        "no gate beat averaging: the best is the fusion concat, which is no gate: concat has +"
    )


@pytest.mark.parametrize("unit", ["clip", "video"])
def test_the_verdict_measures_what_the_board_shows(unit):
    """A rare positive class: by the likeliest class both would be right about as often."""
    shown, kept = [], []
    for number, skill in enumerate((3.0, 1.0)):
        random = np.random.default_rng(number)
        truth = np.repeat(np.arange(60) % 5 == 0, 4)
        scores = skill * truth + random.normal(size=240) - 4
        order = random.permutation(240)
        clips = predictions(np.stack([np.zeros(240), scores], 1)[order], truth[order].astype(int), order // 4, order)
        board = classifier_scores(clips, "task", ["calm", "fight"], "fight", EvaluationConfig(unit=unit))
        shown.append(board["val/accuracy"])
        own = Answers.of(clips, "task")
        kept.append(own.by_video() if unit == "video" else own)
    found = judge({"good": {0: kept[0]}}, {0: kept[1]}, "good", "accuracy", 1, resamples=100)
    assert found.difference == pytest.approx(shown[0] - shown[1], abs=1e-12)
    assert abs(found.difference) > 0.05
    assert len(kept[0].keys) == (60 if unit == "video" else 240)


def predictions(logits: np.ndarray, labels: np.ndarray, group: np.ndarray, number: np.ndarray) -> Predictions:
    count = len(logits)
    return Predictions(
        modalities=("rgb",),
        features=np.zeros((count, 1, 2), np.float32),
        embeddings=None,
        fused=np.zeros((count, 2), np.float32),
        weights=None,
        logits=logits.astype(np.float32),
        unimodal_logits=None,
        present=np.ones((count, 1), bool),
        group=group,
        labels={"task": labels},
        degraded=np.full((count, 1), np.nan),
        keys=[f"video{g}-{one:04d}" for g, one in zip(group, number)],
    )


def test_the_luckiest_of_many_equals_is_not_named():
    """Each replication takes the best of 20 gates that are no better: a naive paired test would name most of them."""
    named, naive = 0, 0
    for replication in range(20):
        start = 1000 * (replication + 1)
        reference = answers(1.0, start)
        gates = {f"gate{k}": {0: answers(1.0, start + 1 + k)} for k in range(20)}
        winner = max(gates, key=lambda name: right_share(gates[name][0]))
        found = judge(gates, {0: reference}, winner, "accuracy", None, resamples=200, seed=replication)
        named += found.p < 0.05
        naive += found.low > 0
    assert named <= 3, f"{named} of 20"
    assert naive > named + 3  # else this test could not fail


def test_averaging_itself_few_groups_and_other_metrics_claim_nothing():
    gates, reference = {"good": {0: answers(3.0, 1)}}, {0: answers(1.0, 2)}
    assert "averaging itself" in judge(gates, reference, "mean", "accuracy", None).said
    assert "cannot be tested" in judge(gates, reference, "good", "loss", None).said
    few = judge({"good": {0: answers(3.0, 1, groups=3)}}, {0: answers(1.0, 2, groups=3)}, "good", "accuracy", None)
    assert not few.beats and "3 validation groups are too few" in few.said
    assert few.metrics() == {"search/over_averaging/beats": 0.0}


def test_pairs_are_of_the_same_seed_and_the_sentence_ends_with_what_p_does_not_know():
    low, high = answers(0.2, 4), answers(3.0, 5)
    found = judge({"good": {1: answers(3.0, 1)}}, {0: low, 1: high}, "good", "accuracy", None, caveats=["3 pruned"])
    assert abs(found.difference) < 0.1, "paired with another seed, which was worse"
    assert "1 seed," in found.said and found.said.endswith("seeds that count; 3 pruned")
    alone = judge({"good": {1: answers(3.0, 1)}, "other": {0: high}}, {0: low}, "good", "accuracy", None)
    assert not alone.beats and "finished with no seed of good" in alone.said


def test_answers_for_other_clips_are_not_paired():
    reference, good = three(1.0, 2), three(3.0, 1)
    fewer = Answers(*(part[:-1] for part in vars(good[0]).values()))
    assert (
        "good was measured on other validation clips"
        in judge({"good": {0: fewer}}, reference, "good", "accuracy", None).said
    )
    found = judge({"good": good, "odd": {0: fewer}}, reference, "good", "accuracy", None)
    assert found.beats and "best of 1 that finished" in found.said
    assert found.said.endswith("; 1 measured on other validation clips not counted")


def test_answers_are_kept_as_they_are(tmp_path):
    kept = answers(1.0, 1)
    assert Answers.read(tmp_path) is None
    kept.write(tmp_path)
    found = Answers.read(tmp_path)
    assert found is not None
    assert all(np.array_equal(a, b) for a, b in zip(vars(kept).values(), vars(found).values()))
    assert [path.name for path in tmp_path.iterdir()] == ["validation.npz"]


def test_what_mattered_is_found_and_conditional_keys_take_part():
    random = np.random.default_rng(0)
    points, values = [], []
    for _ in range(60):
        point = {"gate": str(random.choice(["mean", "softmax"])), "lr": float(random.uniform(0, 1))}
        if point["gate"] == "softmax":
            point["temperature"] = float(random.uniform(0, 1))
        points.append(point)
        values.append(point.get("temperature", 0.0) * 2 + 0.1 * point["lr"])
    shares = importances(points, values)
    assert next(iter(shares)) == "temperature" and sum(shares.values()) == pytest.approx(1.0)
    assert shares["lr"] < 0.1
    assert importances(points[:3], values[:3]) == {}
    assert importances([{"gate": "mean"}] * 9, [0.1] * 9) == {}


def test_every_trial_is_a_line_through_its_settings():
    points = [{"gate": "mean"}, {"gate": "softmax", "lr": 0.1}, {"gate": "softmax", "lr": 0.01}]
    figure = parallel_coordinates(points, [0.5, 0.9, None], "val/accuracy")
    (axis,) = figure.axes
    lines = [line for line in axis.lines if len(line.get_xdata()) > 1 and len(set(line.get_xdata())) > 1]
    assert sorted(len(line.get_xdata()) for line in lines) == [2, 3, 3]  # a pruned one ends before the metric
    texts = {text.get_text() for text in axis.texts}
    assert {"mean", "softmax", "0.01", "0.1", "(not varied)", "0.500", "0.900"} <= texts
    bars = importance_figure({"gate": 0.75, "lr": 0.25}, "val/accuracy").axes[0].patches
    assert [bar.get_width() for bar in bars] == [25.0, 75.0]


def test_schedules_are_drawn_as_steps_to_the_trainings_end() -> None:
    courses = [{"lr": [(0, 0.1), (40, 0.001)], "drop": [(0, 0.0)]}, {"lr": [(0, 0.1)], "drop": [(0, 0.0), (20, 0.4)]}]
    figure = schedules(courses, [0.9, None], 60, "val/accuracy")
    lr, drop = figure.axes
    assert [list(line.get_xdata()) for line in lr.lines] == [[0, 60], [0, 40, 60]]
    assert [list(line.get_ydata()) for line in drop.lines] == [[0.0, 0.4, 0.4], [0.0, 0.0]]
    assert (lr.get_yscale(), drop.get_yscale()) == ("log", "linear")
    assert lr.lines[1].get_linewidth() > lr.lines[0].get_linewidth()
