"""What the demo promises, held against what `make demo` measured in this checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crossgate.evaluation import read_results

DEMO = Path(__file__).resolve().parents[2] / "demo"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def numbers() -> dict[str, float]:
    path = DEMO / "results.json"
    if not path.exists():
        assert "CI" not in os.environ, "run `make demo` first"
        pytest.skip("run `make demo` first")
    return read_results(path)[0]


def test_both_models_beat_chance_by_more_than_their_interval(numbers: dict[str, float]) -> None:
    assert numbers["action/test/accuracy_low"] > numbers["action/test/chance_majority"]
    assert numbers["violence/test/average_precision_low"] > numbers["violence/test/chance_average_precision"]


@pytest.mark.parametrize("task", ["action", "violence"])
def test_a_probe_reads_pretrained_encoders_better_than_random_ones(numbers: dict[str, float], task: str) -> None:
    assert numbers[f"pretrain/test/linear_probe/{task}/all/accuracy_gain"] > 0


def test_the_gain_of_pretraining_is_no_accident_for_action(numbers: dict[str, float]) -> None:
    assert numbers["pretrain/test/linear_probe/action/all/accuracy_gain_low"] > 0
