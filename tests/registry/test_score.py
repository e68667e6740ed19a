"""Scores of a folder as Parquet: each video once, whatever was killed or damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from pyarrow.dataset import dataset
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.config import TrackingConfig
from crossgate.errors import Unreachable, UserError
from crossgate.model.store import build_model, read_card, save_model
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


def plan_of(model_dir: Path, source: Path | str, units: list[list[str]]) -> scoring.ScorePlan:
    return scoring.ScorePlan(str(model_dir), read_card(model_dir).digest, "", str(source), units)


def test_every_video_is_scored_as_the_predictor_does(many: Path, model_dir: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    done = score(str(model_dir), str(many), str(tmp_path), unit=3, progress=lambda *step: steps.append(step))
    rows = table(tmp_path)
    assert (done.videos, done.rows, done.errors) == (7, 9, 1)  # the long one has three clips
    assert steps == [(0, 7), (3, 7), (6, 7), (7, 7)]
    names = {str(path) for path in many.rglob("*") if path.suffix.lower() == ".mp4" and path.name != ".hidden.mp4"}
    assert set(rows["source"]) == names
    assert not rows.duplicated(["source", "start_s"]).any()
    as_documented = dataset(str(tmp_path), exclude_invalid_files=True).to_table().to_pandas()
    assert as_documented["source"].tolist() == rows["source"].tolist()
    (bad,) = rows[rows["error"].notna()].to_dict(orient="records")
    assert bad["source"].endswith("broken.mp4") and pd.isna(bad["label"])
    assert bad["error"].startswith(f"{bad['source']}: ")

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
    plan = plan_of(model_dir, "s3://bucket", [[*names], ["away.mp4"]])
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
    assert f"scored by {model_dir}" in done.output
    for extra, complaint in (
        (["--json"], "takes one folder"),
        ([str(many)], "takes one folder"),
        (["--seconds", "900"], "was begun with --seconds 600, not 900"),
    ):
        assert complaint in str(CliRunner().invoke(app, [*words, *extra]).exception)
    assert "add --out" in str(CliRunner().invoke(app, [*words[:3], "--ray"]).exception)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no videos"):
        score(str(model_dir), str(empty), str(tmp_path / "none"))


def test_an_outage_of_a_folder_is_no_row_either(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that a worker has not mounted, a disk that fails: neither says anything of the videos."""
    store, source = open_store(tmp_path / "out"), tmp_path / "videos"

    def away(name: str, said: str) -> None:
        with pytest.raises(Unreachable, match=rf"{said}.*start again"):
            scoring.score_unit(store, plan_of(model_dir, source, [[name]]), 0)
        assert not (tmp_path / "out" / "part-00000.json").exists()

    away("whole.mp4", "videos: the videos are not there .No such file")
    source.mkdir()
    away("whole.mp4", "videos: the videos are not there .it is empty")  # the place of a mount without it
    shutil.copy(many / "whole0.mp4", source / "whole.mp4")
    (source / "sick.mp4").symlink_to("/proc/self/mem")  # can be looked at, and fails to be read as a sick disk does
    away("sick.mp4", "sick.mp4: cannot be read .Input/output error")
    look = os.stat

    def stale(path, *args, **kwargs):
        if str(path).endswith("stale.mp4"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return look(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(scoring.os, "stat", stale)
        away("stale.mp4", "stale.mp4: cannot be read .Stale file handle")
    scan = os.scandir
    with monkeypatch.context() as patched:

        def sick(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        patched.setattr(os, "scandir", lambda path: sick(path) if str(path).endswith("deep") else scan(path))
        with pytest.raises(Unreachable, match="deep: cannot be read"):
            score(str(model_dir), str(many), str(tmp_path / "unlisted"))

    os.mkfifo(source / "pipe.mp4")
    names = ["whole.mp4", "gone.mp4", "whole.mp4/below.mp4", "pipe.mp4"]
    assert scoring.score_unit(store, plan_of(model_dir, source, [names]), 0) == 4
    errors = table(tmp_path / "out")["error"].tolist()
    assert pd.isna(errors[0])
    assert errors[1:3] == [f"{source}/{name}: gone since the list was made" for name in names[1:3]]
    assert errors[3] == f"{source}/pipe.mp4: no ordinary file"


def test_few_videos_are_in_memory_at_once(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_HELD", (many / "whole0.mp4").stat().st_size + 1)
    names = [f"whole{number}.mp4" for number in range(4)] + ["gone.mp4"]
    batches = scoring._batches(open_store(many), names, scoring.Settings())
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_a_name_that_is_no_text_is_scored(many: Path, model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for name, of in ((b"caf\xe9.mp4", "whole0.mp4"), (b"\xff.mp4", "broken.mp4")):
        shutil.copy(many / of, os.fsdecode(os.fsencode(source) + b"/" + name))
    done = score(str(model_dir), str(source), str(tmp_path / "out"))
    assert (done.videos, done.errors) == (2, 1)
    good, bad = table(tmp_path / "out").sort_values("source").to_dict(orient="records")
    assert good["source"] == f"{source}/caf\ufffd.mp4" and pd.isna(good["error"]) and good["label"]
    assert bad["error"].startswith(f"{source}/\ufffd.mp4: ")


def test_links_lead_to_each_video_once(many: Path, model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    shutil.copytree(many, source)
    (source / "deep" / "up").symlink_to(source)
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(many / "whole0.mp4", other / "linked.mp4")
    (source / "there").symlink_to(other)
    names = sorted(scoring._videos(str(source), pytest.fail))
    assert len(names) == 8 and "there/linked.mp4" in names and "deep/long.mp4" in names


def test_a_folder_that_may_not_be_read_is_named(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scan = os.scandir

    def closed(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    name = "deep"
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", closed)
        done = score(str(model_dir), str(many), str(tmp_path / "out"))
    assert (done.videos, done.left_out) == (5, [str(many / "deep")])
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["left_out"] == done.left_out
    assert f"{many}: folders that may not be read are left out (1): {many / 'deep'}" in caplog.text
    assert score(str(model_dir), str(many), str(tmp_path / "out")) == done, "the list of videos stays"
    name = many.name
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", closed)
        with pytest.raises(Unreachable, match=f"{name}: cannot be read .Permission denied"):
            score(str(model_dir), str(many), str(tmp_path / "none"))


def test_bounds_are_the_first_starts(many: Path, model_dir: Path, tmp_path: Path) -> None:
    source, model = str(many / "deep"), str(model_dir)  # a second, and three
    whole = score(model, source, str(tmp_path / "wide"), bounds={"seconds": 2})
    assert whole.errors == 1 and "lasts 3 s; expected at most 2 s" in table(tmp_path / "wide")["error"].dropna().item()
    assert score(model, source, str(tmp_path / "wide")) == whole
    for asked in ({"seconds": 5}, {"megabytes": 1}):
        (name,) = asked
        with pytest.raises(UserError, match=f"wide: was begun with --{name} .*name another --out"):
            score(model, source, str(tmp_path / "wide"), bounds=asked)
    kept = json.loads((tmp_path / "wide" / "plan.json").read_text())
    assert (kept["megabytes"], kept["seconds"]) == (256, 2)


class Registry:
    """What `runs.score` asks of the registry: names with a champion, and the weights of a version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **folders: Path) -> None:
        self.folders, self.champion, self.asked = folders, 1, []
        monkeypatch.setattr(scoring, "pinned_version", self.pinned_version)
        monkeypatch.setattr(scoring, "fetched", self.fetched)

    def pinned_version(self, uri: str, tracking: TrackingConfig) -> str:
        self.asked.append(tracking.uri)
        name, at, _ = uri.rpartition("@")
        return f"{name}/{self.champion}" if at else uri

    @contextmanager
    def fetched(self, uri: str, tracking: TrackingConfig) -> Iterator[Path]:
        self.asked.append(tracking.uri)
        yield self.folders[uri.split("/")[1]]


def other_weights(model_dir: Path, folder: Path) -> Path:
    torch.manual_seed(7)
    card = read_card(model_dir)
    save_model(folder, build_model(card), card)
    return folder


def test_a_table_keeps_to_one_registered_name(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alias may move on; another name, another version or other weights are never taken for the table's."""
    other = other_weights(model_dir, tmp_path / "runs@home" / "model")
    registry, out = Registry(monkeypatch, a=model_dir, b=other), tmp_path / "out"
    whole = score("models:/a@champion", str(many), str(out), unit=4)
    assert whole.model == "models:/a/1"
    registry.champion = 2
    for same in ("models:/a@champion", "models:/a@challenger", "models:/a/1", str(model_dir)):
        assert score(same, str(many), str(out)) == whole
    for wrong in ("models:/b@champion", "models:/completely-different@champion", "models:/a/2", str(other)):
        with pytest.raises(UserError, match="holds the scores of another model, models:/a/1; name another --out"):
            score(wrong, str(many), str(out))
    (out / "part-00001.json").unlink()
    registry.folders["a"] = other  # another server, whose names and numbers are the same
    scoring._predictor.cache_clear()
    with pytest.raises(UserError, match="models:/a/1: is not the model that the table began with"):
        score("models:/a@champion", str(many), str(out))


def test_a_directory_of_the_same_weights_needs_no_server_and_may_have_moved(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, out, there = Registry(monkeypatch, a=model_dir), tmp_path / "out", tmp_path / "there"
    whole = score("models:/a@champion", str(many), str(out), unit=4, tracking_uri="http://x:5000")
    shutil.copytree(model_dir, there)
    for folder in (there, tmp_path / "moved"):
        if not folder.exists():
            there.rename(folder)
        registry.asked.clear()
        scoring._predictor.cache_clear()
        (out / "part-00001.json").unlink()
        assert score(str(folder), str(many), str(out)) == whole
        assert registry.asked == []
    scoring._predictor.cache_clear()
    begun = score(str(tmp_path / "moved"), str(many), str(tmp_path / "begun"))
    (tmp_path / "moved").rename(there)
    (tmp_path / "begun" / "part-00000.json").unlink()
    scoring._predictor.cache_clear()
    assert score(str(there), str(many), str(tmp_path / "begun")) == begun


def test_the_plan_holds_no_password_and_a_start_asks_the_server_it_is_given(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, out = Registry(monkeypatch, a=model_dir), tmp_path / "out"
    for uri in ("http://ann:s3cret@old:5000", "http://bob:hush@new:5000"):
        registry.asked.clear()
        scoring._predictor.cache_clear()
        score("models:/a@champion", str(many), str(out), tracking_uri=uri)
        assert set(registry.asked) == {uri}
        assert json.loads((out / "plan.json").read_text())["tracking_uri"] == "http://***@old:5000"
        (out / "part-00000.json").unlink()


def test_two_first_starts_follow_one_plan(
    many: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes second goes on with what is there; on a file system without links, and in a bucket, too."""
    real, other = scoring._pinned, str(other_weights(model_dir, tmp_path / "other"))

    def meanwhile(model: str, tracking_uri: str) -> tuple[str, str]:
        monkeypatch.setattr(scoring, "_pinned", real)
        score(model if out.name != "stranger" else other, str(many), str(out), unit=2)
        return real(model, tracking_uri)

    out = tmp_path / "out"
    monkeypatch.setattr(scoring, "_pinned", meanwhile)
    done = score(str(model_dir), str(many), str(out), unit=3)
    plan = json.loads((out / "plan.json").read_text())
    assert [len(unit) for unit in plan["units"]] == [2, 2, 2, 1] and done.videos == 7
    assert not list(out.glob(".*"))

    out = tmp_path / "stranger"
    monkeypatch.setattr(scoring, "_pinned", meanwhile)
    with pytest.raises(UserError, match="holds the scores of another model"):
        score(str(model_dir), str(many), str(out), unit=3)

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patched:
        patched.setattr(scoring.os, "link", refused)
        assert score(str(model_dir), str(many), str(tmp_path / "plain"), unit=2) == done

    class Bucket:
        local, url = False, "s3://bucket/scores"

        def exists(self, name: str) -> bool:
            return False

        def put(self, name: str, content: bytes) -> None:
            """Another start's plan comes right after."""

        def read(self, name: str) -> bytes:
            return (tmp_path / "out" / name).read_bytes()

    theirs = scoring._plan(Bucket(), str(model_dir), str(many), 3, "", {})
    assert theirs.units == plan["units"]
