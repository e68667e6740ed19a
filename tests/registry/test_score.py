"""Scores of a folder as Parquet: each video once, whatever was killed or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.errors import UserError
from crossgate.registry.predictor import Predictor
from crossgate.runs import score as scoring
from crossgate.runs.score import score
from crossgate.stream.storage import open_store


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """Seven videos in two folders, one of them broken, beside what is no video."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "deep").mkdir()
    for number in range(4):
        shutil.copy(videos / "whole.mp4", folder / f"whole{number}.mp4")
    shutil.copy(videos / "long.mp4", folder / "deep" / "long.mp4")
    shutil.copy(videos / "mute.mp4", folder / "deep" / "mute.MP4")
    shutil.copy(videos / "broken.mp4", folder / "broken.mp4")
    (folder / "notes.txt").write_text("no video")
    (folder / ".hidden.mp4").write_text("no video")
    return folder


def table(out: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted(out.glob("part-*.parquet"))], ignore_index=True)


def test_every_video_is_scored_as_the_predictor_does(many: Path, model_dir: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    done = score(str(model_dir), str(many), str(tmp_path), unit=3, progress=lambda *step: steps.append(step))
    rows = table(tmp_path)
    assert (done.videos, done.rows, done.errors) == (7, 9, 1)  # the long one has three clips
    assert steps == [(0, 7), (3, 7), (6, 7), (7, 7)]
    names = {str(path) for path in many.rglob("*") if path.suffix.lower() == ".mp4" and path.name != ".hidden.mp4"}
    assert set(rows["source"]) == names
    assert not rows.duplicated(["source", "start_s"]).any()
    (bad,) = rows[rows["error"].notna()].to_dict(orient="records")
    assert bad["source"].endswith("broken.mp4") and pd.isna(bad["label"])

    direct = Predictor(model_dir).predict([str(many / "deep" / "long.mp4")])
    mine = rows[rows["source"] == str(many / "deep" / "long.mp4")]
    assert mine["label"].tolist() == direct["label"].tolist()
    assert mine["score_fight"].tolist() == pytest.approx([row["fight"] for row in direct["scores"]], abs=1e-5)
    assert mine["weight_audio"].tolist() == pytest.approx([row["audio"] for row in direct["weights"]], abs=1e-5)


def test_a_start_after_a_kill_does_only_what_is_missing(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(str(model_dir), str(many), str(tmp_path / "still"), unit=2)
    real, made = scoring.score_unit, []

    def killed(store, plan, number):
        if number == 2:
            raise KeyboardInterrupt
        made.append(number)
        return real(store, plan, number)

    monkeypatch.setattr(scoring, "score_unit", killed)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        score(str(model_dir), str(many), str(out), unit=2)
    assert made == [0, 1] and not (out / "scores.json").exists()

    (out / "part-00000.parquet").write_bytes((out / "part-00000.parquet").read_bytes()[:-8])  # damaged since
    (out / "part-00003.parquet").write_bytes(b"killed before its mark")
    shutil.copy(many / "whole0.mp4", many / "aaa-later.mp4")  # came later: the plan stays
    made.clear()
    monkeypatch.setattr(scoring, "score_unit", lambda *a: (made.append(a[2]), real(*a))[1])
    try:
        assert score(str(model_dir), str(many), str(out), unit=5) == whole
    finally:
        (many / "aaa-later.mp4").unlink()
    assert made == [0, 2, 3]
    assert table(out).equals(table(tmp_path / "still"))
    made.clear()
    assert score(str(model_dir), str(many), str(out)) == whole and made == []


def test_a_table_belongs_to_one_model_and_one_source(many: Path, model_dir: Path, tmp_path: Path) -> None:
    score(str(model_dir), str(many), str(tmp_path / "out"), unit=9)
    with pytest.raises(UserError, match="holds the scores of .*name another --out"):
        score(str(model_dir), str(many / "deep"), str(tmp_path / "out"))
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"digest": "other"}))
    with pytest.raises(UserError, match="holds the scores of another model"):
        score(str(model_dir), str(many), str(tmp_path / "out"))


def test_a_video_that_is_gone_is_a_row_and_an_outage_is_none(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Remote:
        local = False

        def path(self, name: str) -> str:
            return f"s3://bucket/{name}"

        def exists(self, name: str) -> bool:
            return name != "gone.mp4"

        def size(self, name: str) -> int:
            return 300 << 20 if name == "huge.mp4" else 9000

        def read(self, name: str) -> bytes:
            if name == "away.mp4":
                raise UserError("storage failed", where="s3://bucket")
            assert name != "huge.mp4", "it would be in memory"
            return (many / name).read_bytes()

    monkeypatch.setattr(scoring, "open_store", lambda url: Remote())
    store, names = open_store(tmp_path), ("whole0.mp4", "gone.mp4", "huge.mp4")
    plan = scoring.ScorePlan(str(model_dir), "", "", "s3://bucket", [[*names], ["away.mp4"]])
    assert scoring.score_unit(store, plan, 0) == 3
    rows = table(tmp_path)
    assert rows["source"].tolist() == [f"s3://bucket/{name}" for name in names]
    assert rows["error"].fillna("").tolist() == [
        "",
        "s3://bucket/gone.mp4: gone since the list was made",
        "s3://bucket/huge.mp4: 314572800 bytes; expected at most 256 MB",
    ]
    with pytest.raises(UserError, match="storage failed"):
        scoring.score_unit(store, plan, 1)
    assert not (tmp_path / "part-00001.parquet").exists()


def test_the_command_says_what_it_did_and_refuses_what_it_cannot(many: Path, model_dir: Path, tmp_path: Path) -> None:
    words = ["predict", str(model_dir), str(many), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "9 rows of 7 videos" in done.output
    for extra, complaint in ((["--json"], "takes one folder"), ([str(many)], "takes one folder")):
        assert complaint in str(CliRunner().invoke(app, [*words, *extra]).exception)
    assert "add --out" in str(CliRunner().invoke(app, [*words[:3], "--ray"]).exception)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no videos"):
        score(str(model_dir), str(empty), str(tmp_path / "none"))
