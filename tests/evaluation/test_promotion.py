"""The gate of a release on planted predictions: who passes, who is refused, and for which reason."""

from __future__ import annotations

import numpy as np
import pytest

from crossgate.config import ReleaseConfig
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.promotion import latency_checks, quality_checks

CLASSES = ("walk", "run", "fall")
GATE = ReleaseConfig()


def planted(right: np.ndarray, *, clips: int = 600, modalities: tuple[str, ...] = ("rgb", "audio")) -> Predictions:
    """Predictions that are right where `right` is; audio is missing in every fourth clip, degraded in every fifth."""
    labels = np.arange(clips) % 3
    chosen = np.where(right, labels, (labels + 1) % 3)
    present = np.ones((clips, len(modalities)), bool)
    degraded = np.zeros((clips, len(modalities)))
    if "audio" in modalities:
        present[::4, modalities.index("audio")] = False
        degraded[::5, modalities.index("audio")] = 0.7
    return Predictions(
        modalities=modalities,
        features=np.zeros((clips, len(modalities), 2)),
        embeddings=None,
        fused=np.zeros((clips, 2)),
        weights=None,
        logits=4.0 * np.eye(3)[chosen],
        unimodal_logits=None,
        present=present,
        group=np.arange(clips) // 3,
        labels={"action": labels},
        degraded=degraded,
        keys=[f"c{i}" for i in range(clips)],
    )


def coin(share: float, seed: int = 0, clips: int = 600) -> np.ndarray:
    return np.random.default_rng(seed).random(clips) < share


def refused(new: Predictions, old: Predictions, gate: ReleaseConfig = GATE) -> list[str]:
    return [one.said for one in quality_checks(new, old, "action", CLASSES, "", gate) if not one.passed]


def test_the_same_and_the_better_pass() -> None:
    old = planted(coin(0.7))
    assert refused(old, old) == []
    assert refused(planted(coin(0.7) | coin(0.3, 1)), old) == []


def test_a_worse_one_is_refused_with_the_numbers() -> None:
    (whole, *_) = refused(planted(coin(0.7) & coin(0.8, 1)), planted(coin(0.7)))
    assert whole.startswith("accuracy 0.5")
    assert "600 clips of 200 groups" in whole
    assert "its lower end must reach -0.05" in whole


def test_a_set_too_small_to_tell_refuses() -> None:
    few = 24
    old, new = planted(coin(0.7, 0, few), clips=few), planted(coin(0.7, 1, few), clips=few)
    assert refused(new, old)
    one_group = planted(coin(1.0, 0, few), clips=few)
    one_group.group[:] = 0
    (reason,) = [said for said in refused(one_group, one_group)]
    assert "too few groups" in reason


def test_a_slice_that_gets_worse_refuses_what_is_better_as_a_whole() -> None:
    base = coin(0.6)
    old = planted(base)
    better = base | coin(0.5, 1)
    lost = better & (np.arange(600) % 5 != 0)  # wrong wherever audio is degraded
    (reason,) = refused(planted(lost | (coin(0.3, 2) & (np.arange(600) % 5 != 0))), old)
    assert reason.startswith("degraded audio (120 clips): accuracy -0.")
    loose = GATE.model_copy(update={"slice_margin": 1.0})
    assert refused(planted(lost), old, loose) == []


def test_each_model_answers_by_its_own_threshold() -> None:
    binary = planted(coin(1.0))
    binary.labels = {"violence": np.arange(600) % 2}
    binary.logits = np.stack([np.zeros(600), np.where(binary.labels["violence"] == 1, -1.0, -2.0)], axis=1)

    def said(*thresholds: float) -> list[str]:
        question = ("violence", ("nofight", "fight"), "fight")
        return [
            one.said for one in quality_checks(binary, binary, *question, GATE, thresholds=thresholds) if not one.passed
        ]

    assert said(0.2, 0.2) == said(0.5, 0.5) == said(0.2, 0.5) == []  # 0.27 for fights, 0.12 for the rest
    (lost,) = [one for one in said(0.5, 0.2) if one.startswith("class fight")]
    assert lost.startswith("class fight (300 clips): accuracy -1.000")


def test_small_slices_decide_nothing_and_are_named() -> None:
    strict = GATE.model_copy(update={"slice_clips": 130})
    checks = quality_checks(planted(coin(0.7)), planted(coin(0.7)), "action", CLASSES, "", strict)
    assert checks[-1].passed
    assert "degraded audio (120)" in checks[-1].said


def test_models_of_other_modalities_and_orders_are_paired_by_clip() -> None:
    old = planted(coin(0.7), modalities=("rgb", "flow"))
    mixed = old.select(np.random.default_rng(3).permutation(600))
    assert refused(planted(coin(0.7)), mixed) == []
    with pytest.raises(ValueError, match="no prediction"):
        quality_checks(planted(coin(0.7)), old.select(np.arange(10)), "action", CLASSES, "", GATE)


def test_latency_is_bounded_by_the_champion_and_by_the_clock() -> None:
    assert [one.passed for one in latency_checks(10, 10, GATE)] == [True]
    assert [one.passed for one in latency_checks(16, 10, GATE)] == [False]
    bounded = GATE.model_copy(update={"latency_ms": 5.0})
    assert [one.passed for one in latency_checks(10, 10, bounded)] == [True, False]
