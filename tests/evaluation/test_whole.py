"""The whole evaluations on simulated predictions: what is true is found, test decides nothing."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from crossgate.config import EvaluationConfig
from crossgate.evaluation import (
    classifier_scores,
    compare_gates,
    evaluate_classifier,
    evaluate_pretrain,
    gates,
    retrieval_scores,
    write_report,
)
from crossgate.evaluation import comparison as cmp
from crossgate.evaluation.intervals import Bootstrap
from crossgate.evaluation.report import render

NAMES = ["walk", "run", "wave", "<b>clap</b>", "$5"]
FIGHT = ["fight", "nofight"]
CONFIG = EvaluationConfig(bootstrap=200, gallery=100)


@pytest.fixture(scope="module")
def splits():
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("_simulated", Path(__file__).with_name("conftest.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(**options):
        return [
            module.simulate(n, seed, split=name, **options)
            for n, seed, name in ((200, 1, "train"), (80, 2, "val"), (120, 3, "test"))
        ]

    return make


def test_pretrained_beats_random_and_chance(splits, tmp_path):
    done = evaluate_pretrain(*splits(), {"action": NAMES}, CONFIG, tuple(splits(skill=0.0)))
    m = done.metrics
    assert m["test/linear_probe/action/fused/accuracy_low"] > m["test/chance_action_majority"]
    assert m["test/linear_probe/action/fused/accuracy_gain_low"] > 0
    assert m["test/linear_probe_random/action/fused/accuracy"] < 0.4
    assert m["test/knn/action/rgb/accuracy"] > 0.4
    assert m["test/retrieval/mean/r_at_10_low"] > m["test/retrieval/mean/r_at_10_chance"]
    assert m["test/retrieval_random/mean/r_at_10"] < m["test/retrieval/mean/r_at_10_low"]
    assert m["test/retrieval/rgb_to_flow/gallery"] < 100  # siblings are out
    assert "val/retrieval/mean/r_at_1" in m
    assert "lies above chance" in done.summary
    assert "random weights" in done.summary
    assert set(done.figures) == {"retrieval", "probe_action"}
    page = write_report(tmp_path / "report.html", "t", done.sections, summary=done.summary).read_text()
    assert page.count("<img") == 2


def test_a_network_that_knows_nothing_is_not_praised(splits):
    done = evaluate_pretrain(*splits(skill=0.0), {"action": NAMES}, CONFIG)
    assert "interval lies above" not in done.summary.split("\n\n")[1]
    assert not any("gain" in name for name in done.metrics)


def test_pretrain_without_labels_or_probe_still_measures_retrieval(splits):
    train, val, test = splits()
    for one in (train, val, test):
        one.labels = {}
    done = evaluate_pretrain(train, val, test, {"action": NAMES}, CONFIG)
    assert [section.title for section in done.sections] == ["Retrieval between modalities"]
    quiet = CONFIG.model_copy(update={"probe": False})
    assert not any("probe" in name for name in evaluate_pretrain(*splits(), {"action": NAMES}, quiet).metrics)


def test_pretrain_refuses_a_baseline_of_other_clips(splits):
    other = [one.select(np.arange(10)) for one in splits()]
    with pytest.raises(ValueError, match="have no prediction"):
        evaluate_pretrain(*splits(), {"action": NAMES}, CONFIG, tuple(other))


def test_random_baseline_is_matched_by_key(splits):
    plain = evaluate_pretrain(*splits(), {"action": NAMES}, CONFIG, tuple(splits(skill=0.0)))
    draws = np.random.default_rng(0)
    mixed = tuple(one.select(draws.permutation(len(one))) for one in splits(skill=0.0))
    again = evaluate_pretrain(*splits(), {"action": NAMES}, CONFIG, mixed)
    assert again.metrics == pytest.approx(plain.metrics)


def test_action_classifier(splits):
    train, val, test = splits(skill=0.7)
    done = evaluate_classifier(val, test, NAMES, "", CONFIG, train, task="action")
    m = done.metrics
    assert m["test/accuracy"] == pytest.approx((test.logits.argmax(1) == test.labels["action"]).mean())
    assert m["test/accuracy_low"] < m["test/accuracy"] < m["test/accuracy_high"]
    assert m["test/accuracy_low"] > m["test/chance_majority"]
    assert m["test/gate/correlation_severity_rgb_high"] < 0
    assert m["test/compare/oracle/accuracy"] >= m["test/compare/uniform_mean/accuracy"]
    assert m["test/compare/shuffled_gate/accuracy"] < m["test/compare/gate_on_single_heads/accuracy"]
    assert m["test/compare/mask_only/accuracy"] < 0.35
    assert all(isinstance(x, float) and math.isfinite(x) for x in m.values())
    assert set(done.figures) == {
        "action_confusion",
        "action_comparison",
        "action_calibration",
        "action_gate_by_class",
        "action_gate_by_severity",
    }


def test_violence_classifier(splits):
    train, val, test = splits(classes=2, task="violence", skill=0.7)
    done = evaluate_classifier(val, test, FIGHT, "fight", CONFIG, train, task="violence")
    m = done.metrics
    assert m["test/average_precision_low"] > m["test/chance_average_precision"]
    assert 0 <= m["test/fnr_at_fixed_fpr"] <= 1
    assert m["test/compare/this_model/average_precision"] == pytest.approx(m["test/average_precision"])
    assert "test/compare/oracle/average_precision" not in m, "an oracle's scores know the truth"
    assert m["test/compare/oracle/accuracy"] >= m["test/compare/uniform_mean/accuracy"]
    assert {"violence_precision_recall", "violence_roc"} <= set(done.figures)


def test_thresholds_do_not_depend_on_test(splits):
    _, val, test = splits(classes=2, task="violence", skill=0.7)
    first = evaluate_classifier(val, test, FIGHT, "fight", CONFIG, task="violence")
    worse = test.select(np.arange(40))
    worse.logits = worse.logits + np.array([5.0, 0.0])  # everything looks like a fight
    second = evaluate_classifier(val, worse, FIGHT, "fight", CONFIG, task="violence")
    chosen = {k: v for k, v in first.metrics.items() if k.startswith("val/")}
    assert chosen == {k: v for k, v in second.metrics.items() if k.startswith("val/")}
    assert {"val/threshold", "val/threshold_fixed_fpr", "val/accuracy"} <= set(chosen)
    assert second.metrics["test/fpr_at_fixed_fpr"] > 0.5, "the threshold did not follow"


def test_a_class_missing_in_test_no_gate_and_no_unimodal_heads(splits):
    _, val, test = splits()
    test = test.select(test.labels["action"] != 4)
    test.weights = test.unimodal_logits = None
    done = evaluate_classifier(val, test, NAMES, "", CONFIG, task="action")
    assert [section.title for section in done.sections] == ["Result: action"]
    assert math.isfinite(done.metrics["test/mean_class_accuracy"])


def test_unlabelled_clips_are_left_out_and_no_label_at_all_is_refused(splits):
    _, val, test = splits()
    test.labels["action"] = np.where(np.arange(len(test)) < 50, test.labels["action"], -1)
    assert evaluate_classifier(val, test, NAMES, "", CONFIG, task="action").metrics["test/clips"] == 50
    test.labels["action"][:] = -1
    with pytest.raises(ValueError, match="no test clip has a label of task 'action'"):
        evaluate_classifier(val, test, NAMES, "", CONFIG, task="action")


def test_two_classes_without_the_positive_one_are_measured_by_accuracy(splits):
    train, val, test = splits(classes=2, task="violence")
    calm = ("calm", "storm")
    assert "val/average_precision" not in classifier_scores(val, "violence", calm, "fight", CONFIG)
    assert "val/accuracy" in classifier_scores(val, "violence", calm, "fight", CONFIG)
    done = evaluate_classifier(val, test, calm, "fight", CONFIG, train, task="violence")
    assert "test/average_precision" not in done.metrics
    assert done.metrics["test/accuracy"] > 0.5


def test_a_modality_that_no_test_clip_has_is_absent_and_no_error(splits):
    train, val, test = splits()
    test.present[:, -1] = False
    name = test.modalities[-1]
    done = evaluate_pretrain(train, val, test, {"action": NAMES}, CONFIG)
    assert not [key for key in done.metrics if key.startswith("test/retrieval") and name in key]
    done = evaluate_classifier(val, test, NAMES, "", CONFIG, train, task="action")
    assert f"test/gate/weight_{name}" not in done.metrics
    assert render("t", done.sections)


def test_pretrain_without_validation(splits):
    train, val, test = splits()
    done = evaluate_pretrain(train, val.select(np.arange(0)), test, {"action": NAMES}, CONFIG)
    assert not [key for key in done.metrics if key.startswith("val/")]
    assert done.metrics["test/linear_probe/action/fused/accuracy"] > 0.5


def test_quick_scores_for_the_loop(splits):
    _, val, _ = splits()
    scores = classifier_scores(val, "action", NAMES, "", CONFIG)
    has = val.present[:, 1]
    logits, labels = val.unimodal_logits[has, 1], val.labels["action"][has]
    assert scores[f"val/nll_{val.modalities[1]}"] == pytest.approx(
        log_loss(labels, softmax(logits, 1), labels=range(len(NAMES)))
    )
    assert scores["val/accuracy"] == pytest.approx((val.logits.argmax(1) == val.labels["action"]).mean())
    assert not any(name.endswith(("_low", "_high")) for name in scores)
    assert classifier_scores(val, "no such task", NAMES, "", CONFIG) == {}
    assert retrieval_scores(val, CONFIG)["val/retrieval/mean/r_at_10"] > 0.1


def test_comparison_of_gates(splits):
    _, val, test = splits()
    weak = splits(skill=0.3)
    shuffled = test.select(np.random.default_rng(0).permutation(len(test)))
    kinds: dict[str, cmp.Kind] = {"mean": "average", "softmax": "gate", "poor": "gate"}
    rows = compare_gates(
        {"mean": (val, test), "softmax": (val, shuffled), "poor": (weak[1], weak[2])}, kinds, "action", NAMES, CONFIG
    )
    by_name = {row.name: row for row in rows}
    assert list(by_name) == [
        *(f"{m} alone" for m in test.modalities),
        "uniform mean",
        "uniform mean of logits",
        "fixed weights",
        "average: mean",
        "gate: softmax",
        "gate: poor",
    ]
    assert by_name["uniform mean"].difference is None
    assert by_name["gate: softmax"].score == by_name["average: mean"].score, "clips are matched by key"
    assert by_name["gate: poor"].difference.high < 0
    assert by_name["audio alone"].difference.p < 0.05
    text = cmp.table(rows).text()
    assert len({len(line) for line in text.splitlines()[:2]}) == 1


def test_fixed_weights_of_a_binary_task_are_those_that_rank_validation_best(splits):
    _, val, test = splits(classes=2, task="violence", skill=0.4)
    weights = {
        metric: gates.fixed_weights(
            val.unimodal_logits, val.present, val.labels["violence"], partial(cmp.statistic, metric, positive=0)
        )[0]
        for metric in ("average_precision", "accuracy")
    }
    best, other = (" ".join(f"{w:.1f}" for w in one) for one in weights.values())
    assert best != other
    rows = compare_gates({"mean": (val, test)}, {"mean": "average"}, "violence", FIGHT, CONFIG, positive="fight")
    assert [row.note for row in rows if row.name == "fixed weights"] == [best]
    done = evaluate_classifier(val, test, FIGHT, "fight", CONFIG, task="violence")
    shown = [row for section in done.sections for table in section.tables for row in table.rows]
    assert {row[1] for row in shown if row[0] == "fixed weights"} == {f"average: {best}"}


def test_compare_needs_its_reference_and_a_known_metric(splits):
    _, _, test = splits()
    entry = cmp.Entry("a", "gate", np.full((len(test), 5), 0.2))
    bootstrap = Bootstrap(test.group, 20)
    with pytest.raises(ValueError, match="uniform mean"):
        cmp.compare([entry], test.labels["action"], bootstrap)
    with pytest.raises(ValueError, match="roc_auc"):
        cmp.statistic("roc_auc", entry.probabilities, test.labels["action"])
    assert cmp.positive_class(FIGHT, "fight") == 0
    assert cmp.positive_class(NAMES, "walk") is None
