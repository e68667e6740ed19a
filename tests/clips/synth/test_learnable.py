"""The data's purpose: each modality tells something, none tells all, together they tell much, on unseen groups."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import roc_auc_score
from synth_features import rows, tables

pytestmark = pytest.mark.slow  # a minute: some hundred clips are rendered and read again


@pytest.fixture(scope="module")
def scores(many) -> dict[str, dict[str, float]]:
    """On the test groups, by modality: accuracy of the action, ROC-AUC of a fight; ``fused`` sees all features."""
    lines = rows(many)
    found = tables(many.parent, lines)
    found["fused"] = np.hstack(list(found.values()))
    test = np.array([row["split"] == "test" for row in lines])
    result: dict[str, dict[str, float]] = {}
    for label in ("action", "violence"):
        y = np.array([row[label] for row in lines])
        result[label] = {}
        for name, x in found.items():
            wide = 0.2 if name == "fused" else "sqrt"
            trees = ExtraTreesClassifier(120, max_features=wide, random_state=0).fit(x[~test], y[~test])
            if label == "action":
                result[label][name] = float(trees.score(x[test], y[test]))
            else:
                result[label][name] = float(roc_auc_score(y[test] == "fight", trees.predict_proba(x[test])[:, 0]))
    return result


def test_every_modality_knows_something_about_the_action(scores):
    for name in ("rgb", "flow", "audio", "depth"):
        assert scores["action"][name] > 2 / 12


def test_no_single_modality_knows_the_action(scores):
    single = max(value for name, value in scores["action"].items() if name != "fused")
    assert scores["action"]["fused"] > single + 0.08
    assert scores["action"]["fused"] > 0.6


def test_no_single_modality_knows_the_violence(scores):
    single = max(value for name, value in scores["violence"].items() if name != "fused")
    assert scores["violence"]["fused"] > single + 0.01
    assert scores["violence"]["fused"] > 0.9
