"""The list of a run's checkpoints: what is there, and what of it can be used."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.recipe import dump_recipe, parse_recipe

AGES = {"step-00000004": 3723.0, "step-00000120": 60.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A recipe whose run has two checkpoints, in its folder and in the store."""
    tree = {
        "kind": "finetune",
        "run": {"name": "mine", "output": str(tmp_path / "runs")},
        "training": {"checkpoint_url": str(tmp_path / "store")},
    }
    (tmp_path / "mine.yaml").write_text(dump_recipe(parse_recipe(tree)))
    store = tmp_path / "store" / "mine"
    store.mkdir(parents=True)
    piece = b"x" * (3 << 20)
    sha256 = hashlib.sha256(piece).hexdigest()
    for name, age in AGES.items():
        folder = tmp_path / "runs" / "mine" / "checkpoints" / name
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "rank-00000.safetensors").write_bytes(piece)
        files = {"state/rank-00000.safetensors": {"size": len(piece), "sha256": sha256}}
        step = int(name.removeprefix("step-"))
        manifest = {"step": step, "ranks": 1, "stage": 0, "recipe": "", "stream": {}, "files": files, "version": 2}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (store / f"{name}.state--rank-00000.safetensors").write_bytes(piece)
        (store / f"{name}.manifest.json").write_text(json.dumps(manifest))
        for file in (folder / "manifest.json", store / f"{name}.manifest.json"):
            os.utime(file, (time.time() - age,) * 2)
    return tmp_path


def listed(run: Path) -> Result:
    return CliRunner().invoke(app, ["checkpoints", "-c", str(run / "mine.yaml")])


def rows(result: Result) -> list[list[str]]:
    return [line.split(maxsplit=5) for line in result.output.splitlines()[3:]]


def test_all_that_are_there_are_listed(run: Path) -> None:
    result = listed(run)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == str(run / "runs" / "mine")
    sized = "whole by its files' lengths"
    assert [[*row[:4], row[5]] for row in rows(result)] == [
        ["folder", "4", "3.0", "MiB", "whole"],
        ["folder", "120", "3.0", "MiB", "whole"],
        ["store", "4", "3.0", "MiB", sized],
        ["store", "120", "3.0", "MiB", sized],
    ]
    assert [row[4].rpartition(":")[0] for row in rows(result)] == ["1:02", "1", "1:02", "1"]


def test_damage_is_named_and_ends_with_1(run: Path) -> None:
    piece = run / "runs" / "mine" / "checkpoints" / "step-00000120" / "state" / "rank-00000.safetensors"
    piece.write_bytes(b"y" * piece.stat().st_size)
    (run / "store" / "mine" / "step-00000004.state--rank-00000.safetensors").write_bytes(b"x")
    (run / "store" / "mine" / "step-00000120.manifest.json").unlink()
    result = listed(run)
    assert result.exit_code == 1
    assert [row[5] for row in rows(result)] == [
        "whole",
        "damaged: state/rank-00000.safetensors has changed since it was written",
        "damaged: state/rank-00000.safetensors has 1 bytes instead of 3145728",
        "damaged: no manifest, so it is on its way there or was cut off",
    ]


def test_a_run_without_any(tmp_path: Path) -> None:
    tree = {
        "kind": "pretrain",
        "run": {"name": "mine", "output": str(tmp_path)},
        "training": {"checkpoint_url": str(tmp_path / "store")},
    }
    (tmp_path / "mine.yaml").write_text(dump_recipe(parse_recipe(tree)))
    result = listed(tmp_path)
    assert (result.exit_code, result.output) == (0, f"no checkpoint yet in {tmp_path / 'mine'}\n")
