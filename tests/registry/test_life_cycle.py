"""The life of a registered model decided by the real gate, on a frozen set with groups enough for an interval."""

from __future__ import annotations

import csv
from pathlib import Path

import av
import numpy as np
import pytest
from life_cycle import live

from crossgate.cluster.ray_train import launch
from crossgate.evaluation.results import read_results
from crossgate.recipe import parse_recipe
from crossgate.runs.pack import PackSettings, pack

GROUPS = {"train": 16, "val": 8, "test": 24}
RATE = 16_000

pytestmark = pytest.mark.slow


def film(path: Path, bright: bool, sound: bool, seed: int) -> None:
    """A second of noise: bright with a loud tone, or dark with a quiet one; or without sound."""
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        track = target.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for _ in range(8):
            picture = random.integers(60, 120, (48, 48, 3)) + (100 if bright else 0)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        target.mux(stream.encode(None))
        if track is not None:
            tone = (0.8 if bright else 0.05) * np.sin(np.arange(RATE) * 0.2)
            block = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
            block.sample_rate, block.pts = RATE, 0
            target.mux(track.encode(block))
            target.mux(track.encode(None))


def films(folder: Path) -> Path:
    """Writes a film a group, every other one of a fight, half of each without sound; returns their manifest."""
    folder.mkdir()
    rows = [
        {
            "path": f"{split}{n:02d}.mp4",
            "label": ("fight", "nofight")[n % 2],
            "group": f"{split}{n:02d}",
            "split": split,
        }
        for split, count in GROUPS.items()
        for n in range(count)
    ]
    for seed, row in enumerate(rows):
        film(folder / row["path"], row["label"] == "fight", seed % 4 < 2, seed)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder / "manifest.csv"


def test_a_model_that_has_learnt_is_defended_and_succeeded(tmp_path: Path) -> None:
    shards, uri = str(tmp_path / "shards"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    pack(films(tmp_path / "films"), shards, PackSettings(task="violence", modalities=("rgb", "audio"), workers=1))
    clip = {"modalities": ["rgb", "audio"], "frames": 2, "size": 32, "mels": 32, "seconds": 1.0}
    recipe = parse_recipe(
        {
            "kind": "finetune",
            "run": {"name": "learnt", "output": str(tmp_path / "runs")},
            "data": {"index": shards, "global_batch": 8, "clip": clip},
            "model": {"dim": 16, "encoders": {name: {"backbone": "test_convnext"} for name in clip["modalities"]}},
            "finetune": {"task": "violence"},
            "training": {"steps": 40, "log_every": 20, "eval_every": 20, "save_every": 40},
            "optim": {"lr": 0.003},
            "cluster": {"launcher": "local"},
            "tracking": {"uri": uri},
        }
    )
    launch(recipe)
    run = tmp_path / "runs" / "learnt"
    metrics, _ = read_results(run / "results.json")
    assert metrics["test/groups"] == GROUPS["test"]
    assert metrics["test/average_precision_low"] > 0.7, "it has learnt nothing that the gate could defend"

    first, worse, equal, back = live(run, tmp_path / "others", uri, shards)
    assert "WARNING" not in first
    for said in (worse, equal):
        assert "24 clips of 24 groups" in said and "too few groups" not in said
        for part in ("class fight (12 clips)", "class nofight (12 clips)", "without audio (12 clips)", "forward pass"):
            assert part in said
    assert "REFUSED average precision" in worse and "REFUSED class fight" in worse
    assert "REFUSED" not in equal
    assert back.endswith("version 1 is champion")
