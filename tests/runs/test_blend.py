"""Weights of losses estimated from what a fine-tuning logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_road import tiny_tree, write_recipe
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.cluster.ray_train import launch
from crossgate.errors import UserError
from crossgate.evaluation import read_results
from crossgate.runs.blend import blend_weights, estimate_blend
from crossgate.runs.context import run_directory
from crossgate.training.metrics import read_metrics

Losses = tuple[float, float, float]


def logged(folder: Path, lines: list[dict[str, float]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def validated(step: int, val: Losses, train: Losses | None = None) -> dict[str, float]:
    """A line of a validation: losses of the fused head, rgb's and audio's."""
    parts = {"val": val} | ({"train": train} if train else {})
    suffixes = ("", "_rgb", "_audio")
    losses = {f"{part}/nll{suffix}": x for part, values in parts.items() for suffix, x in zip(suffixes, values)}
    return {"step": step, **losses}


LINES = [
    validated(5, (9, 9, 9)),  # nothing was measured of training
    validated(10, (2.0, 2.0, 2.1), (2.0, 2.0, 2.0)),
    {"step": 12, "train/loss/fused": 9, "train/loss/rgb": 9, "train/loss/audio": 9},  # smoothed, weighed, partly hidden
    validated(15, (1.0, 1.0, 1.0), (7.0, 7.0, 7.0)),  # neither first nor last
    validated(20, (1.5, 2.3, 1.9), (1.0, 2.3, 1.7)),
]


def test_the_first_validation_is_held_against_the_last(tmp_path: Path) -> None:
    """Gains 0.5, -0.3 and 0.2; gaps that grow by 0.5, 0 and 0.1: 0.5/0.25 = 2, nothing, 0.2/0.01 = 20."""
    found = estimate_blend(logged(tmp_path / "run", LINES))
    assert list(found) == ["fused", "rgb", "audio"]
    assert found == pytest.approx({"fused": 2 / 22, "rgb": 0, "audio": 20 / 22})
    said = CliRunner().invoke(app, ["blend", str(tmp_path / "run")])
    assert said.output.splitlines()[-1] == "finetune.blend=[0.091,0.000,0.909]"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "0 validations.*expected two or more; train with a smaller training.eval_every"),
        (LINES[:2], "1 validations"),
        (
            [validated(10, (2, 2, 2)), validated(20, (1, 1, 1))],
            "no validation measured training clips.*; train with finetune.measure_train=true",
        ),
        (
            [LINES[1], validated(20, (3, 3, 3), (1, 1, 1))],
            "no head got better on validation between steps 10 and 20",
        ),
        (
            [LINES[1], validated(20, (1.5, 2.0, 1.9), (1.0, 0.0, 1.8))],  # audio's gap stays, rgb gains nothing
            "what audio overfits cannot be told from noise: between steps 10 and 20 .* less than 0.01 nats.*train for",
        ),
        (
            [LINES[1], validated(20, (1.0, 1.0, 1.0), (1.5, 1.5, 1.5))],  # training clips are the harder ones
            "what fused, rgb, audio overfits cannot be told",
        ),
    ],
)
def test_what_cannot_be_estimated_is_said(tmp_path: Path, lines: list, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        estimate_blend(logged(tmp_path / "run", lines))


def test_blending_by_hand() -> None:
    assert blend_weights([0.5, 0.2, 0.0], [0.5, 0.1, 0.0]) == pytest.approx([2 / 22, 20 / 22, 0.0])
    assert blend_weights([0.5, -0.2], [0.5, 0.001]) == [1.0, 0.0]


def test_training_clips_are_measured_as_validation_clips_are(road: Path, tmp_path: Path) -> None:
    """The weights that a run kept say of its training split, validated by another run, what was logged of it."""
    keys = {"task": "violence", "label_smoothing": 0.5, "balance": True, "measure_train": True}
    hidden = {"model": {"fusion": {"modality_dropout": 0.5}}, "tracking": {"enabled": False}}
    launch(first := write_recipe(tmp_path / "one.yaml", tiny_tree(road, tmp_path, "finetune", finetune=keys, **hidden)))
    lines = [line for line in read_metrics(run_directory(first)) if "val/nll" in line]
    assert [line["step"] for line in lines] == [2, 4]
    best = max(lines, key=lambda line: line["val/average_precision"])

    tree = tiny_tree(road, tmp_path, "evaluate", evaluation={"model": str(run_directory(first))}, **hidden)
    tree["data"] |= {"train": ["val"], "val": ["train"]}
    launch(second := write_recipe(tmp_path / "two.yaml", tree))
    measured, _ = read_results(run_directory(second) / "results.json")
    logged_of_train = {name.removeprefix("train/") for name in best if name.startswith("train/nll")}
    assert logged_of_train == {"nll", "nll_rgb", "nll_flow", "nll_audio", "nll_depth"}
    for name in logged_of_train:
        assert best[f"train/{name}"] == pytest.approx(measured[f"val/{name}"], rel=1e-5), name
