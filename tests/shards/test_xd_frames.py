"""XD-Violence in miniature, from the official layout to the published metric: annotations, packing, frames."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import xd_violence
from manifest_of import finish
from sklearn import metrics as sk
from tiny_road import tiny_tree, write_recipe
from tiny_videos import write_video

from crossgate.cluster.ray_train import launch
from crossgate.errors import UserError
from crossgate.evaluation import frames as frame_metrics
from crossgate.evaluation import read_results
from crossgate.runs.context import run_directory
from crossgate.runs.pack import PackSettings

TESTED = {  # 40 frames of 12 a second: clips begin at 0, 12, 24, and the last four are none
    "One.1999__#00-00-01_00-00-04_label_B1-0-0": "5 16 30 40",
    "v=abc__#1_label_G-0-0": "0 11",
    "Two.2001__#00-01-00_00-01-03_label_A": "",
    "v=def__#1_label_A": "",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/`, the official layout, and `shards/`."""
    folder = tmp_path_factory.mktemp("xd")
    for name in ("1-1004", "test_videos"):
        (folder / "data" / name).mkdir(parents=True)
    for number in range(8):
        label = "B2-0-0" if number % 2 else "A"
        target = folder / "data" / "1-1004" / f"Film{number}__#1_label_{label}.mp4"
        write_video(target, number, frames=24, sound=True)
    for number, name in enumerate(TESTED):
        write_video(folder / "data" / "test_videos" / f"{name}.mp4", 10 + number, frames=40, sound=True)
    lines = (f"{name} {events}" for name, events in TESTED.items() if events)
    (folder / "data" / "annotations.txt").write_text("\n".join(lines) + "\n")
    finish(
        xd_violence.videos(folder / "data"),
        folder / "xd.csv",
        PackSettings(seconds=1.0, workers=1, val_fraction=0.5),
        str(folder / "shards"),
    )
    return folder


def tree(packed: Path, output: Path) -> dict:
    sections = {
        "data": {"clip": {"modalities": ["rgb", "audio"], "frames": 2, "size": 32, "mels": 32, "seconds": 1.0}},
        "finetune": {"task": "violence", "positive": "violent"},
        "evaluation": {"unit": "video", "frames": True, "bootstrap": 50},
    }
    made = tiny_tree(packed, output, "finetune", **sections)
    made["model"]["encoders"] = {name: {"backbone": "test_convnext"} for name in ("rgb", "audio")}
    return made


def test_the_report_has_the_published_metric(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    plain = frame_metrics.frame_level

    def kept(scores, spans, bootstrap):
        asked["scores"], asked["spans"] = scores, spans
        return plain(scores, spans, bootstrap)

    monkeypatch.setattr(frame_metrics, "frame_level", kept)
    recipe = write_recipe(tmp_path / "xd.yaml", tree(packed, tmp_path))
    launch(recipe)
    found, _ = read_results(run_directory(recipe) / "results.json")
    assert found["test/frames"] == 160 and found["test/frames_positive"] == 11 + 10 + 11
    assert sorted(span.begin for span in asked["spans"]) == [0] * 4 + [12] * 4 + [24] * 4
    truth, said = [], []
    for name, events in TESTED.items():
        edges = list(map(int, events.split()))
        pairs = list(zip(edges[::2], edges[1::2]))
        own = {s.begin: x for s, x in zip(asked["spans"], asked["scores"]) if s.video.endswith(f"{name}.mp4")}
        truth += [any(first <= frame < after for first, after in pairs) for frame in range(40)]
        said += [own[min(frame // 12, 2) * 12] for frame in range(40)]
    assert found["test/frame_average_precision"] == pytest.approx(sk.average_precision_score(truth, said))
    precision, recall, _ = sk.precision_recall_curve(truth, said)
    assert found["test/frame_average_precision_trapezoid"] == pytest.approx(sk.auc(recall, precision))
    assert "by the trapezoidal rule" in (run_directory(recipe) / "report.html").read_text()


def test_what_cannot_be_judged_by_frames_is_refused_before_training(road: Path, packed: Path, tmp_path: Path) -> None:
    without = tiny_tree(road, tmp_path, "finetune", finetune={"task": "violence"}, evaluation={"frames": True})
    with pytest.raises(UserError, match=r"no test clip says at which frames.*evaluation\.frames=false"):
        launch(write_recipe(tmp_path / "without.yaml", without))
    other = tree(packed, tmp_path)
    other["finetune"]["positive"] = "fight"
    with pytest.raises(UserError, match=r"evaluation\.frames: frames are told apart by two classes"):
        launch(write_recipe(tmp_path / "other.yaml", other))
    assert not list(tmp_path.glob("*/checkpoints"))


def test_a_test_video_that_cannot_be_read_is_left_to_the_packer(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "data", tmp_path / "data")
    (tmp_path / "data" / "test_videos" / "v=abc__#1_label_G-0-0.mp4").write_bytes(b"no video")
    found = {video.path.stem: video.extra for video in xd_violence.videos(tmp_path / "data")}
    assert found["v=abc__#1_label_G-0-0"] == {"events": "G"}
    assert json.loads(found["One.1999__#00-00-01_00-00-04_label_B1-0-0"]["frames"]) == 40
