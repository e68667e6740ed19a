"""Weights of losses estimated from what a fine-tuning logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.errors import UserError
from crossgate.runs.blend import blend_weights, estimate_blend


def logged(folder: Path, lines: list[dict[str, float]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train(step: int, fused: float, rgb: float, audio: float) -> dict[str, float]:
    return {"step": step, "train/loss/fused": fused, "train/loss/rgb": rgb, "train/loss/audio": audio}


def val(step: int, fused: float, rgb: float, audio: float) -> dict[str, float]:
    return {"step": step, "val/nll": fused, "val/nll_rgb": rgb, "val/nll_audio": audio}


LINES = [
    val(0, 9, 9, 9),  # nothing was logged of training yet
    train(10, 2.0, 2.0, 2.0),
    val(10, 2.0, 2.0, 2.1),
    train(15, 7.0, 7.0, 7.0),
    val(15, 1.0, 1.0, 1.0),  # neither first nor last
    train(20, 1.0, 2.0, 1.7),
    val(20, 1.5, 2.3, 1.9),
]


def test_the_first_validation_is_held_against_the_last(tmp_path: Path) -> None:
    found = estimate_blend(logged(tmp_path / "run", LINES))
    assert list(found) == ["fused", "rgb", "audio"]
    assert found == pytest.approx({"fused": 2 / 22, "rgb": 0, "audio": 20 / 22})
    said = CliRunner().invoke(app, ["blend", str(tmp_path / "run")])
    assert said.output.splitlines()[-1] == "finetune.blend=[0.091,0.000,0.909]"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "0 validations.*expected two or more; train with"),
        (LINES[:3], "1 validations"),
        (
            [*LINES[:3], train(20, 1, 1, 1), val(20, 3, 3, 3)],
            "no head got better on validation between steps 10 and 20",
        ),
    ],
)
def test_what_cannot_be_estimated_is_said(tmp_path: Path, lines: list, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        estimate_blend(logged(tmp_path / "run", lines))


def test_blending_by_hand() -> None:
    """Gains 0.5, 0.2 and 0; gaps that grow by 0.5, 0.1 and 0.3: 0.5/0.25 = 2, 0.2/0.01 = 20, 0."""
    weights = blend_weights([2.0, 2.0, 2.0], [2.0, 2.1, 2.0], [1.0, 1.7, 2.0], [1.5, 1.9, 2.3])
    assert weights == pytest.approx([2 / 22, 20 / 22, 0.0])


def test_a_gap_that_closes_counts_as_a_hundredth_and_without_any_gain_there_is_no_answer() -> None:
    assert blend_weights([2.0, 2.0], [2.0, 2.0], [1.9, 1.0], [1.5, 1.5]) == pytest.approx(
        [0.5 / 0.01**2 / (0.5 / 0.01**2 + 0.5 / 0.25), 0.5 / 0.25 / (0.5 / 0.01**2 + 0.5 / 0.25)]
    )
    assert blend_weights([2.0], [2.0], [1.0], [2.5]) == [0.0]
