"""Checkpoints in a store: there whole or not at all, back when the folder is lost, never in training's way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from test_numbers import spawn
from tiny_run import Crash, losses, run_fit, tiny_recipe

from crossgate.errors import Unreachable, UserError
from crossgate.stream.failures import explain
from crossgate.stream.storage import PROBE, Store
from crossgate.training import upload
from crossgate.training.checkpoint import newest_whole, prune
from crossgate.training.requests import REQUESTS
from crossgate.training.upload import (
    Uploader,
    checkpoint_store,
    fetch_checkpoint,
    refuse_unwritable,
    stored_checkpoints,
)


def recipe(folder: Path, **training):
    training = {"checkpoint_url": str(folder / "store"), "keep": 2} | training
    return tiny_recipe(folder / "runs", "run", training=training)


def store(folder: Path) -> Store:
    found = checkpoint_store(str(folder / "store"), "run")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory) -> Path:
    """A finished run of 12 steps, saved at 4, 8 and 12 and uploaded."""
    folder = tmp_path_factory.mktemp("uploaded")
    run_fit(recipe(folder), validated=False)
    return folder


@pytest.fixture
def copied(uploaded, tmp_path) -> Path:
    shutil.copytree(uploaded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_store_keeps_what_the_folder_keeps(uploaded):
    kept = sorted(path.name for path in (uploaded / "runs" / "run" / "checkpoints").iterdir())
    assert stored_checkpoints(store(uploaded)) == kept == ["step-00000008", "step-00000012"]
    assert {name.split(".")[0] for name in store(uploaded).list()} == set(kept)


def test_a_lost_folder_comes_back_from_the_store(copied, uploaded, capsys):
    shutil.rmtree(copied / "runs")
    for path in (copied / "store" / "run").glob("step-00000012.*"):
        path.unlink()
    result = run_fit(recipe(copied), validated=False)
    assert result.resumed_from == 8
    said = " ".join(capsys.readouterr().err.split())
    assert f"took checkpoint step-00000008 from {copied / 'store' / 'run'}" in said
    assert "step-00000008, the newest whole checkpoint" in said
    assert losses(copied / "runs", "run") == pytest.approx(losses(uploaded / "runs", "run")[8:], rel=0, abs=2e-6)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("flip", "state/rank-00000.safetensors has changed since it was written"),
        ("manifest", "unreadable manifest"),
        ("escape", "it would write outside its folder"),
        ("remove", "no such file"),
        ("cut", "bytes instead of"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_used(copied, harm, reason):
    victim = copied / "store" / "run" / "step-00000012.state--rank-00000.safetensors"
    manifest = copied / "store" / "run" / "step-00000012.manifest.json"
    if harm == "flip":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "manifest":
        manifest.write_text("{")
    elif harm == "escape":
        manifest.write_text(json.dumps({"files": {"../../evil": {"size": 0, "sha256": ""}}}))
    else:
        victim.unlink()
    folder = copied / "fresh"
    folder.mkdir()
    assert reason in fetch_checkpoint(store(copied), "step-00000012", folder)
    assert not list(folder.iterdir())
    shutil.rmtree(copied / "runs")
    assert run_fit(recipe(copied), validated=False).resumed_from == 8


@pytest.mark.parametrize("local", ["damaged", "lost"])
def test_damaged_in_the_store_as_well_is_refused(copied, local, capsys):
    for piece in (copied / "store" / "run").glob("*random*"):
        piece.write_bytes(b"")
    if local == "lost":
        shutil.rmtree(copied / "runs")
    else:
        for piece in (copied / "runs").rglob("random*"):
            piece.write_bytes(b"")
    with pytest.raises(UserError, match=rf"no checkpoint of this run is whole.*and {copied}/store/run aside"):
        run_fit(recipe(copied), validated=False)
    assert len(stored_checkpoints(store(copied))) == 2


def test_damaged_in_the_folder_only_is_taken_from_the_store(copied):
    for piece in (copied / "runs").rglob("random*"):
        piece.write_bytes(b"")
    assert run_fit(recipe(copied), validated=False).resumed_from == 12


def described_otherwise(folder: Path, **fields: object) -> None:
    manifest = folder / "store" / "run" / "step-00000012.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))
    shutil.rmtree(folder / "runs")


def test_a_stored_one_of_unknown_contents_is_passed_over_and_one_of_another_version_refused(copied, capsys):
    described_otherwise(copied, what_is_this=1)
    assert run_fit(recipe(copied), validated=False).resumed_from == 8
    assert "passed over checkpoint step-00000012 of" in " ".join(capsys.readouterr().err.split())
    described_otherwise(copied, version=3)
    with pytest.raises(UserError, match="it has format 3, not 2"):
        run_fit(recipe(copied), validated=False)
    local = copied / "runs" / "run" / "checkpoints" / "step-00000012"
    assert local.exists(), "nothing is lost"


def validated(folder: Path):
    """A run whose best checkpoint is not its newest."""
    settings = recipe(folder, eval_every=6, save_every=4, keep=1)

    def crash(step: int) -> None:
        if step == 11:
            raise Crash

    with pytest.raises(Crash):
        run_fit(settings, on_step=crash)
    checkpoint, _ = newest_whole(folder / "runs" / "run")
    best = checkpoint.path.with_name(f"step-{checkpoint.manifest.best_step:08d}")
    assert best != checkpoint.path and best.exists()
    until = time.monotonic() + 60
    while stored_checkpoints(store(folder)) != [best.name, checkpoint.path.name]:
        assert time.monotonic() < until
        time.sleep(0.01)  # the crashed run's thread is there for as long as this process
    return settings, best / "state" / "rank-00000.safetensors"


@pytest.mark.parametrize("uploaded", [True, False])
def test_a_damaged_best_one_is_taken_from_the_store_or_forgotten(tmp_path, capsys, uploaded):
    settings, piece = validated(tmp_path)
    piece.write_bytes(piece.read_bytes()[:-1])
    if not uploaded:
        store(tmp_path).delete(f"{piece.parents[1].name}.manifest.json")
    run_fit(settings)
    said = " ".join(capsys.readouterr().err.split())
    assert ("took the best checkpoint so far" in said) is uploaded
    assert ("forgot the best checkpoint so far" in said) is not uploaded


def test_the_best_one_that_did_not_arrive_is_brought_there_by_the_next_start(tmp_path):
    settings, piece = validated(tmp_path)
    best = piece.parents[1].name
    store(tmp_path).delete(f"{best}.manifest.json")
    run_fit(settings)
    assert best in stored_checkpoints(store(tmp_path))


class Away(Store):
    """A store that is listed, and then does not answer."""

    def read_range(self, name, start, end):
        raise Unreachable("storage failed (503)", where=self.path(name))


@pytest.mark.parametrize("lost", ["newest", "best"])
def test_a_store_that_fails_on_the_way_is_no_damage(tmp_path, monkeypatch, lost):
    settings, best = validated(tmp_path)
    folder = tmp_path / "runs" / "run" / "checkpoints"
    if lost == "newest":
        shutil.rmtree(folder / "step-00000008")
        assert "step-00000008" in stored_checkpoints(store(tmp_path))
    else:
        best.write_bytes(best.read_bytes()[:-1])
    before = stored_checkpoints(store(tmp_path))
    monkeypatch.setattr(
        "crossgate.training.loop.checkpoint_store", lambda url, run: Away(str(tmp_path / "store" / "run"))
    )
    with pytest.raises(Unreachable):
        run_fit(settings)
    assert stored_checkpoints(store(tmp_path)) == before
    monkeypatch.undo()
    assert run_fit(settings).resumed_from == 8


def test_a_disk_that_fills_while_one_is_fetched_is_told_as_that(copied, monkeypatch):
    shutil.rmtree(copied / "runs")

    opened = Path.open

    def full(path, mode="r", **how):
        if "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, **how)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="cannot write a checkpoint .*free some space"):
        fetch_checkpoint(store(copied), "step-00000012", copied)


def test_a_finished_run_that_is_told_to_end_waits_for_its_upload_no_longer_than_its_grace(
    tmp_path, monkeypatch, capsys
):
    gate = threading.Event()

    class Slow(Store):
        def put(self, name, content):
            if name != PROBE:
                gate.wait(60)

    monkeypatch.setattr("crossgate.training.loop.checkpoint_store", lambda url, run: Slow(str(tmp_path / "store")))
    monkeypatch.setattr("crossgate.training.loop.GRACE_S", 0.3)
    monkeypatch.setattr(upload, "_LOOK_S", 0.1)
    told = threading.Timer(0.5, REQUESTS.ask_to_stop)
    result = run_fit(recipe(tmp_path), validated=False, on_step=lambda step: told.start() if step == 12 else None)
    assert result.step == 12
    assert "is still on its way" in " ".join(capsys.readouterr().err.split())
    gate.set()


def test_a_whole_folder_needs_no_store(tmp_path, monkeypatch, capsys):
    settings, _ = validated(tmp_path)
    monkeypatch.setattr("crossgate.training.loop.checkpoint_store", lambda url, run: Failing(str(tmp_path / "store")))
    assert run_fit(settings).step == 12
    assert "forgot" not in capsys.readouterr().err


def test_what_did_not_arrive_is_brought_there_by_the_next_start(copied, capsys):
    for path in (copied / "store" / "run").glob("step-00000012.*"):
        path.unlink()
    run_fit(recipe(copied), validated=False)
    assert stored_checkpoints(store(copied)) == ["step-00000008", "step-00000012"]


def test_a_run_that_must_end_waits_for_its_upload_as_long_as_it_may(copied):
    gate, said = threading.Event(), []

    class Slow(Store):
        def put(self, name, content):
            gate.wait(60)

    uploader = Uploader(Slow(str(copied / "other")), said.append)
    uploader.put(copied / "runs" / "run" / "checkpoints" / "step-00000012", [])
    while not uploader.travelling:
        time.sleep(0.01)
    assert uploader.over(until=time.monotonic() + 0.1)
    assert said == [f"step-00000012 is still on its way to {copied / 'other'}: the next start brings it there"]
    gate.set()
    uploader.finish()


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def note(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}").replace(".partial", "").replace("/.", "/"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    run_fit(tiny_recipe(tmp_path, "run"), validated=False)
    folder = tmp_path / "run" / "checkpoints" / "step-00000012"
    beside = folder.with_name(f"tmp-{folder.name}")
    expected = {str(beside / path.relative_to(folder)) for path in folder.rglob("*")} | {
        str(beside),
        str(folder.parent),
    }
    assert expected <= synced


def test_an_upload_that_was_cut_off_is_no_checkpoint(copied):
    (copied / "store" / "run" / "step-00000012.manifest.json").unlink()  # it comes last
    assert stored_checkpoints(store(copied)) == ["step-00000008"]


def test_the_folder_is_preferred_where_it_is_as_new(copied):
    shutil.rmtree(copied / "runs" / "run" / "checkpoints" / "step-00000008")
    assert run_fit(recipe(copied), validated=False).resumed_from == 12
    checkpoint, _ = newest_whole(copied / "runs" / "run")
    assert checkpoint.step == 12


class Failing(Store):
    """A store that is down."""

    def put(self, name, content):
        raise Unreachable("storage failed (503)", where=self.path(name))

    def list(self, suffix=""):
        raise Unreachable("storage failed (503)", where=self.url)


def test_a_store_that_fails_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("crossgate.training.loop.checkpoint_store", lambda url, run: Failing(str(tmp_path / "store")))
    (tmp_path / "store").mkdir()
    with pytest.raises(UserError, match="storage failed"):  # and there is no folder either: starting anew is no answer
        run_fit(recipe(tmp_path), validated=False)
    monkeypatch.setattr("crossgate.training.checkpoint.stored_checkpoints", lambda store: [])
    result = run_fit(recipe(tmp_path), validated=False)
    assert result.step == 12
    assert "step-00000012 was not uploaded; the next one, or the next start, is tried" in " ".join(
        capsys.readouterr().err.split()
    )
    assert newest_whole(tmp_path / "runs" / "run")[0].step == 12


def test_a_store_that_can_never_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(UserError) as caught:
        run_fit(recipe(tmp_path), validated=False)
    where = f"training.checkpoint_url, {tmp_path / 'store' / 'run'}"
    assert str(caught.value).startswith(f"{where}: it takes no checkpoints (")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs" / "run" / "checkpoints").iterdir())

    def denied(self, name, content):
        raise explain(PermissionError(), self.path(name))

    monkeypatch.setattr(Store, "put", denied)
    (tmp_path / "store").unlink()
    with pytest.raises(UserError, match=rf"^{where}: it takes no checkpoints \(access denied\); check who"):
        run_fit(recipe(tmp_path), validated=False)


def test_a_refusal_of_rank_0_is_every_ranks(tmp_path):
    (tmp_path / "store").write_text("a file")
    sections = {"training": {"checkpoint_url": str(tmp_path / "store")}}
    case = {"output": str(tmp_path), "name": "run", "sections": sections, "validated": False}
    for process in spawn([case], tmp_path / "cases", 2):
        assert process.returncode == 1
        assert "UserError: training.checkpoint_url" in process.stdout.splitlines()[-1], process.stdout


def test_trying_a_store_leaves_nothing_there(tmp_path):
    (tmp_path / "store" / "run").mkdir(parents=True)
    refuse_unwritable(store(tmp_path))
    assert not list((tmp_path / "store" / "run").iterdir())


def test_a_fault_of_any_kind_leaves_the_thread_alive_for_the_next_checkpoint(copied):
    class Faulty(Store):
        def put(self, name, content):
            if name.startswith("step-00000008"):
                raise RuntimeError("a fault that nobody thought of")
            super().put(name, content)

    said: list[str] = []
    uploader = Uploader(Faulty(str(copied / "other")), said.append)
    checkpoints = copied / "runs" / "run" / "checkpoints"
    uploader.put(checkpoints / "step-00000008", [])
    while not said:
        time.sleep(0.01)
    uploader.put(checkpoints / "step-00000012", [])
    uploader.finish()
    assert uploader.failures == 1 and "nobody thought of" in said[0]
    assert uploader.uploaded == "step-00000012"


def test_only_the_newest_and_the_best_set_out_and_none_is_not_deleted_on_its_way(tmp_path):
    gate, begun, seen = threading.Event(), threading.Event(), []

    class Slow(Store):
        def put(self, name, content):
            seen.append(name.split(".")[0])
            begun.set()
            gate.wait(60)
            super().put(name, content)

    for step in range(1, 5):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"files": {}}')
    uploader = Uploader(Slow(str(tmp_path / "store")), print)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    uploader.put(folders[0], [])
    assert begun.wait(60)
    for folder in folders[1:]:
        uploader.put(folder, ["step-00000002"], "step-00000002")
    assert prune(tmp_path, 1, 4, 2, uploader.travelling) == {"step-00000004", "step-00000002"}
    left = [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert left == ["1", "2", "4"]
    gate.set()
    uploader.finish()
    assert seen == ["step-00000001", "step-00000002", "step-00000004"], "the newest, and the best that waits"
    assert stored_checkpoints(Store(str(tmp_path / "store"))) == ["step-00000002", "step-00000004"]
    assert (uploader.uploaded, uploader.failures, uploader.travelling) == ("step-00000004", 0, "")


def test_a_store_without_writing_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"training\.checkpoint_url: http stores are read only"):
        run_fit(recipe(tmp_path, checkpoint_url="https://example.org/x"), validated=False)


def test_a_crash_leaves_the_thread_behind_without_harm(tmp_path):
    def crash(step: int) -> None:
        if step == 6:
            raise Crash

    with pytest.raises(Crash):
        run_fit(recipe(tmp_path), validated=False, on_step=crash)
    assert run_fit(recipe(tmp_path), validated=False).resumed_from == 4
