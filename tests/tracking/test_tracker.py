"""Runs in a real MLflow on SQLite: one run a directory, in order, nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from free_ports import free_port
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from crossgate.config import Recipe, TrackingConfig
from crossgate.errors import Passing, Unreachable, UserError
from crossgate.recipe import flat_recipe, parse_recipe, redacted
from crossgate.tracking import MlflowTracker, NullTracker, Tracker, conclude, deliver, known_run, open_tracker, pinned
from crossgate.tracking.delivery import Delivery
from crossgate.tracking.server import Server, connect, tracking_uri
from crossgate.tracking.spool import Spool


def recipe_for(output: Path, **tracking: object) -> Recipe:
    return parse_recipe({"kind": "pretrain", "run": {"output": str(output)}, "tracking": tracking})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; its SQLite file is made once (migrations take seconds)."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def client(store: Path) -> MlflowClient:
    uri = f"sqlite:///{store / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_run_has_parameters_tags_metrics_artifacts(store: Path, client: MlflowClient) -> None:
    recipe, run_dir = recipe_for(store), store / "whole"
    tracker = open_tracker(recipe, run_dir, 0, tags={"crossgate.index": "abc123"})
    for step in (10, 20):
        tracker.log_metrics({"loss": step / 100, "time/data_wait_pct": 1.5}, step)
    run_dir.joinpath("report.html").write_text("<html>")
    tracker.log_artifact(run_dir / "report.html")
    outside = store / "confusion.txt"
    outside.write_text("table")
    tracker.log_artifact(outside, "figures")
    outside.unlink()  # a temporary file may go at once
    tracker.log_text("hello", "notes/hello.txt")
    tracker.finish()

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "whole"
    assert run.data.params == flat_recipe(recipe)
    assert run.data.tags["crossgate.index"] == "abc123"
    assert run.data.tags["crossgate.kind"] == "pretrain"
    assert run.data.tags["crossgate.version"]
    assert run.data.tags["crossgate.host"]
    assert len(run.data.tags.get("mlflow.source.git.commit", "0" * 40)) == 40
    assert history(client, tracker.run_id, "loss") == [(10, 0.1), (20, 0.2)]
    assert {f.path for f in client.list_artifacts(tracker.run_id)} == {"recipe.yaml", "report.html", "figures", "notes"}
    assert [f.path for f in client.list_artifacts(tracker.run_id, "figures")] == ["figures/confusion.txt"]
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(store), "artifacts lie beside the runs"
    assert not any((run_dir / "tracking" / "outbox").iterdir()), "copies are removed once they are delivered"


def test_a_resumed_run_is_the_same_run_without_gap_or_double(store: Path, client: MlflowClient) -> None:
    recipe, run_dir = recipe_for(store), store / "resumed"
    killed = open_tracker(recipe, run_dir, 0, interval=3600)
    for step in range(10):
        killed.log_metrics({"loss": float(step)}, step)
    # No finish: a kill -9 leaves the journal, here with half a line at its end.
    with (run_dir / "tracking" / "spool.jsonl").open("a") as lines:
        lines.write('{"lane": "values", "metr')

    with open_tracker(recipe, run_dir, 0) as resumed:
        for step in range(6, 15):  # from the checkpoint at step 5
            resumed.log_metrics({"loss": float(step)}, step)
    assert resumed.run_id == killed.run_id == known_run(run_dir)
    assert history(client, resumed.run_id, "loss") == [(step, float(step)) for step in range(15)]
    for line in (run_dir / "tracking" / "spool.jsonl").read_text().splitlines():
        json.loads(line)  # half a line would have spoilt the next one
    assert client.get_run(resumed.run_id).info.status == "FINISHED"


def test_delivered_twice_is_stored_once(store: Path, client: MlflowClient) -> None:
    """A kill between a delivery and its mark repeats the delivery."""
    run_dir = store / "twice"
    with open_tracker(recipe_for(store), run_dir, 0) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    mark = run_dir / "tracking" / "delivered.json"
    mark.write_text(mark.read_text().split('"offsets"')[0] + '"offsets": {"values": 0, "files": 0}}')
    assert deliver(run_dir, recipe_for(store).tracking) == 0
    assert history(client, tracker.run_id, "loss") == [(1, 1.0)]


def test_a_setting_that_changed_on_resume_becomes_a_tag(store: Path, client: MlflowClient) -> None:
    run_dir = store / "changed"
    for workers in (2, 1):
        recipe = parse_recipe({"kind": "pretrain", "cluster": {"workers": workers}})
        with open_tracker(recipe, run_dir, 0) as tracker:
            pass
    data = client.get_run(tracker.run_id).data
    assert data.params["cluster.workers"] == "2"
    assert data.tags["crossgate.changed.cluster.workers"] == "1"


def test_a_new_directory_of_the_same_name_is_a_new_run(store: Path) -> None:
    ids = set()
    for folder in ("a", "b"):
        recipe = recipe_for(store, uri=f"sqlite:///{store / 'mlflow.db'}")
        with open_tracker(recipe, store / folder / "same", 0) as tracker:
            ids.add(tracker.run_id)
    assert len(ids) == 2


def test_run_id_in_the_environment_hijacks_nothing(
    store: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tracker(recipe_for(store), store / "parent", 0) as parent:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", parent.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    with open_tracker(recipe_for(store), store / "child", 0, parent=parent.run_id) as child:
        child.log_metrics({"loss": 1.0}, 0)
    assert child.run_id != parent.run_id
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert history(client, parent.run_id, "loss") == []


def test_a_failed_body_is_a_failed_run(store: Path, client: MlflowClient) -> None:
    for name, error, status in (("failed", ValueError, "FAILED"), ("killed", KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), open_tracker(recipe_for(store), store / name, 0) as tracker:
            raise error
        assert client.get_run(tracker.run_id).info.status == status


def test_what_mlflow_refuses_is_left_out_and_the_rest_arrives(
    store: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    with open_tracker(recipe_for(store), store / "refused", 0) as tracker:
        tracker.log_metrics({"gate/weight{rgb}": 0.5, "not_finite": float("nan")}, 1)
        tracker.set_tags({"bad\nkey!": "x", "good": "y"})
        tracker.log_metrics({"loss": 1.0}, 2)
        tracker.log_artifact(store / "no such file")
    data = client.get_run(tracker.run_id).data
    assert data.metrics["gate/weight_rgb_"] == 0.5
    assert data.metrics["loss"] == 1.0
    assert data.tags["good"] == "y"
    assert "no such file" in caplog.text


def test_other_ranks_and_disabled_tracking_touch_nothing(tmp_path: Path) -> None:
    assert isinstance(open_tracker(recipe_for(tmp_path), tmp_path / "run", 1), NullTracker)
    off = open_tracker(recipe_for(tmp_path, enabled=False), tmp_path / "run", 0)
    off.log_metrics({"loss": 1.0}, 1)
    off.finish()
    assert off.run_id == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://user:secret@127.0.0.1:PORT", "does not answer"),
        ("file:///tmp/mlruns", "no longer writes to plain folders"),
        ("mlruns", "no longer writes to plain folders"),
        ("ftp://host/x", "unknown kind of tracking server"),
        ("sqlite:////proc/none/x.db", "cannot be made"),
        ("sqlite:////proc/x.db", "this database takes no data (unable to open database file)"),
        ("sqlite:////bin/sh", "this database takes no data (file is not a database)"),
        ("postgresql://user:secret@127.0.0.1:9/db", "does not answer"),
    ],
)
def test_a_wrong_server_is_one_clear_line(tmp_path: Path, uri: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        open_tracker(recipe_for(tmp_path, uri=uri.replace("PORT", str(free_port()))), tmp_path / "run", 0)
    assert not isinstance(caught.value, Passing), "a misspelt address is told at once, nothing tries it again"
    line = str(caught.value)
    assert says in line
    assert "tracking.uri" in line
    assert "\n" not in line
    assert "secret" not in line


def test_a_password_is_shown_nowhere(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "postgresql://user:secret@host/db"
    database = f"sqlite:///{store / 'mlflow.db'}"

    def talkative(_: str) -> None:
        raise RuntimeError(f"cannot connect as user with secret: {uri}")

    monkeypatch.setattr("crossgate.tracking.server.make_client", talkative)
    with pytest.raises(UserError) as caught:
        open_tracker(recipe_for(tmp_path, uri=uri.replace("PORT", str(free_port()))), tmp_path / "run", 0)
    assert "secret" not in str(caught.value)

    client = MlflowClient(tracking_uri=database, registry_uri=database)
    monkeypatch.setattr("crossgate.tracking.server.make_client", lambda _: client)
    monkeypatch.setattr("crossgate.tracking.tracker.make_client", lambda _: client)
    with open_tracker(recipe_for(tmp_path, uri=uri.replace("PORT", str(free_port()))), tmp_path / "run", 0) as tracker:
        pass
    assert client.get_run(tracker.run_id).data.params["tracking.uri"] == "postgresql://***@host/db"
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and "secret" in f.read_text()]


def test_a_stored_address_gets_its_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stored = {kind: TrackingConfig(uri=redacted(f"{kind}://ann:s3cret@host/db")) for kind in ("https", "postgresql")}
    assert tracking_uri(stored["https"], ".") == "https://host/db"  # MLflow takes name and password by itself
    with pytest.raises(UserError, match=r"tracking.uri postgresql://\*\*\*@host/db: .* set MLFLOW_TRACKING_URI"):
        tracking_uri(stored["postgresql"], ".")
    for kind, config in stored.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{kind}://ann:s3cret@host/db")
        assert tracking_uri(config, ".") == f"{kind}://ann:s3cret@host/db"


def test_nested_runs_share_the_parents_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert pinned(TrackingConfig(), tmp_path).uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert pinned(TrackingConfig(uri="http://host"), tmp_path).uri == "http://host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@host")
    assert pinned(TrackingConfig(), tmp_path).uri == "", "what the environment says stays there"


def give_up(tracker: Tracker) -> None:
    """Ends a tracker whose server is away, and with it the thread that might send after all when it is back."""
    assert isinstance(tracker, MlflowTracker)
    tracker.finish(timeout=0.1)
    tracker._delivery._thread.join(60)
    assert not tracker._delivery._thread.is_alive()


@contextmanager
def no_server() -> Iterator[None]:
    """Nobody answers, at whatever address."""

    def dead(*_: object) -> None:
        raise ConnectionError("nobody there")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crossgate.tracking.server.make_client", dead)
        patch.setattr("crossgate.tracking.tracker.make_client", dead)
        yield


def test_a_restart_while_the_server_is_away_goes_on(
    store: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, run_dir = recipe_for(store), store / "away"
    with open_tracker(recipe, run_dir, 0) as tracker:
        tracker.log_metrics({"loss": 0.0}, 0)

    with no_server():
        again = open_tracker(recipe, run_dir, 0)
        again.log_metrics({"loss": 1.0}, 1)
        give_up(again)
    assert "the run goes on" in caplog.text
    assert "wait in" in caplog.text
    assert history(client, tracker.run_id, "loss") == [(0, 0.0)]
    assert deliver(run_dir, recipe.tracking) == 0
    assert again.run_id == tracker.run_id
    assert history(client, tracker.run_id, "loss") == [(0, 0.0), (1, 1.0)]


@pytest.mark.parametrize("ended", [True, False])
def test_a_nested_run_whose_server_is_away_at_its_first_start_is_made_later(
    store: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture, ended: bool
) -> None:
    """Ended by itself or killed, it is sent by those who come after it."""
    recipe, run_dir = recipe_for(store), store / f"nested-{ended}"
    with open_tracker(recipe, store / "search", 0) as parent:
        pass
    with no_server():
        child = open_tracker(recipe, run_dir, 0, parent=parent.run_id, interval=3600)
        child.log_metrics({"loss": 1.0}, 1)
        if ended:
            give_up(child)
        again = open_tracker(recipe, run_dir, 0, parent=parent.run_id, interval=3600)
        again.log_metrics({"loss": 2.0}, 2)
        if ended:
            give_up(again)
        with pytest.raises(Unreachable, match=r"tracking.uri .*: this database takes no data \(nobody there\)"):
            conclude(run_dir, recipe.tracking, "KILLED")
    assert caplog.text.count("the run goes on") == 2
    assert child.run_id == known_run(run_dir) == ""

    time.sleep(1.0)
    conclude(run_dir, recipe.tracking, "KILLED")
    run = client.get_run(known_run(run_dir))
    assert run.info.status == ("FINISHED" if ended else "KILLED")
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.params == flat_recipe(recipe)
    assert history(client, run.info.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    first = client.get_metric_history(run.info.run_id, "loss")[0]
    assert run.info.start_time <= first.timestamp, "it began when it trained, not when it was told of"
    key = f"tags.`crossgate.run_key` = '{json.loads((run_dir / 'tracking' / 'run.json').read_text())['key']}'"
    assert len(client.search_runs([run.info.experiment_id], key)) == 1


def test_what_keeps_others_from_ending_a_run_is_one_kind_of_error(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run_dir = recipe_for(store), store / "unwritable"
    open_tracker(recipe, run_dir, 0, interval=3600)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", full)
        with pytest.raises(UserError, match=r"cannot write the run's journal \(No space"):
            conclude(run_dir, recipe.tracking, "KILLED")

    def silent(*_: object, **__: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "search_runs", silent)
        with pytest.raises(Unreachable, match=r"server failed \(RuntimeError\)"):
            conclude(run_dir, recipe.tracking, "KILLED")
    conclude(run_dir, recipe.tracking, "KILLED")


def test_a_server_that_hangs_holds_nobody_up(
    store: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run_dir, answer = recipe_for(store), store / "hangs", threading.Event()

    def hanging(uri: str) -> MlflowClient:
        answer.wait()
        return client

    monkeypatch.setattr("crossgate.tracking.tracker.make_client", hanging)
    tracker = open_tracker(recipe, run_dir, 0, interval=0.01)
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.finish(timeout=0.2)  # comes back although nothing was sent
    assert history(client, tracker.run_id, "loss") == []
    answer.set()
    assert deliver(run_dir, recipe.tracking) == 0
    assert len(history(client, tracker.run_id, "loss")) == 1000


def test_a_full_disk_costs_metrics_and_not_the_run(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(recipe_for(store), store / "full", 0)
    assert isinstance(tracker, MlflowTracker)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._spool, "append", full)
        for step in range(3):
            tracker.log_metrics({"loss": 1.0}, step)
    tracker.finish()
    assert caplog.text.count("No space left on device") == 1


def test_a_full_disk_under_the_database_is_one_line(store: Path, tmp_path: Path) -> None:
    """A bound on the length of a file stands for the end of a disk."""
    with open_tracker(recipe_for(store), store / "any", 0):
        pass
    shutil.copyfile(store / "mlflow.db", tmp_path / "mlflow.db")
    code = f"""
import os, resource, time
from crossgate.recipe import parse_recipe
from crossgate.tracking import open_tracker
tracker = open_tracker(parse_recipe({{'kind': 'pretrain'}}), {str(tmp_path / "run")!r}, interval=0.1)
until = time.monotonic() + 60
while tracker._spool.waiting() and time.monotonic() < until:
    time.sleep(0.05)
size = os.path.getsize({str(tmp_path / "mlflow.db")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
for step in range(2000):
    tracker.log_metrics({{'loss': 1.0}}, step)
while not tracker._delivery._down and time.monotonic() < until:
    time.sleep(0.05)
tracker.finish(timeout=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    down, left = done.stderr.splitlines()
    assert "does not take data ((sqlite3.OperationalError)" in down and "kept in" in down
    assert "has not taken everything" in left
    assert done.stdout == ""


def test_what_was_given_up_is_not_said_to_have_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path)
    spool.append({"lane": "values", "metrics": {"loss": 1.0}, "step": 1})
    asked: list[int] = []
    delivery = Delivery(spool, lambda: asked.append(1))  # type: ignore[arg-type, return-value]
    delivery._say_down(OSError("down"))
    with monkeypatch.context() as patch:
        patch.setattr(delivery._wake, "wait", lambda seconds: delivery._abandoned.set())  # between two tries
        delivery._run()
    assert not asked, "by then others may be sending"
    delivery = Delivery(spool, lambda: delivery._abandoned.set(), interval=0.01)  # type: ignore[arg-type, return-value]
    delivery._down = True
    delivery._run()  # while it connects
    assert "does not take data" in caplog.text and "is back" not in caplog.text


def test_a_server_that_answers_after_a_run_was_given_up_gets_that_run_once(
    store: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, run_dir = recipe_for(store), store / "late"
    with open_tracker(recipe, store / "search", 0) as parent:
        pass
    with no_server():
        child = open_tracker(recipe, run_dir, 0, parent=parent.run_id, interval=0.01)
    assert isinstance(child, MlflowTracker)
    asked, answer = threading.Event(), threading.Event()

    def slow(*given: object) -> Server:
        asked.set()
        answer.wait()
        return connect(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("crossgate.tracking.tracker.connect", slow)
    child.log_metrics({"loss": 1.0}, 1)
    assert asked.wait(60)
    child.finish(timeout=0.1)
    answer.set()
    child._delivery._thread.join(60)
    assert known_run(run_dir) == "" and "answered too late" not in caplog.text
    conclude(run_dir, recipe.tracking, "FINISHED")
    key = f"tags.`crossgate.run_key` = '{json.loads((run_dir / 'tracking' / 'run.json').read_text())['key']}'"
    experiment = client.get_run(parent.run_id).info.experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment], key)] == [known_run(run_dir)]


def test_a_tracker_says_while_its_server_is_away(store: Path) -> None:
    with no_server():
        tracker = open_tracker(recipe_for(store), store / "gone", 0, parent="of-some-search", interval=0.01)
        until = time.monotonic() + 60
        while not tracker.away and time.monotonic() < until:
            time.sleep(0.01)
        assert tracker.away
    while tracker.away and time.monotonic() < until:
        time.sleep(0.01)
    assert not tracker.away
    tracker.finish()


def test_mlflow_is_quiet_even_when_it_makes_its_database(tmp_path: Path) -> None:
    code = f"""
from crossgate.recipe import parse_recipe
from crossgate.tracking import open_tracker
with open_tracker(parse_recipe({{'kind': 'pretrain'}}), {str(tmp_path / "run")!r}) as tracker:
    tracker.log_metrics({{'loss': 1.0}}, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_clips_are_inputs_of_their_run_and_noted_once(store: Path, client: MlflowClient) -> None:
    for start in range(2):  # a resumed run notes them again
        with open_tracker(recipe_for(store), store / "clips", 0) as tracker:
            profile = {"index_digest": "f" * 64, "splits": {"train": {"clips": 7}}}
            tracker.log_dataset("shards:train", "a" * 64, "s3://ann:s3cret@bucket/shards", "train", profile)
            if start:
                tracker.log_dataset("shards:val", "b" * 64, "s3://bucket/shards", "val", {})
    inputs = {one.tags[0].value: one.dataset for one in client.get_run(tracker.run_id).inputs.dataset_inputs}
    assert set(inputs) == {"train", "val"}
    assert json.loads(inputs["train"].profile) == profile
    assert (inputs["train"].name, inputs["train"].digest) == ("shards:train", "a" * 36)
    assert "s3cret" not in inputs["train"].source and "bucket/shards" in inputs["train"].source


def test_the_run_of_a_killed_process_is_ended_by_others_once(store: Path, client: MlflowClient) -> None:
    recipe = recipe_for(store)
    killed = open_tracker(recipe, store / "stopped", 0, interval=3600)  # a thread that is still there sends nothing
    killed.log_metrics({"loss": 1.0}, 1)
    assert client.get_run(killed.run_id).info.status == "RUNNING"
    conclude(store / "stopped", recipe.tracking, "KILLED")
    assert client.get_run(killed.run_id).info.status == "KILLED"
    assert history(client, killed.run_id, "loss") == [(1, 1.0)]
    with open_tracker(recipe, store / "stopped", 0):
        pass
    conclude(store / "stopped", recipe.tracking, "KILLED")
    assert client.get_run(killed.run_id).info.status == "FINISHED"
    conclude(store / "never-tracked", recipe.tracking, "KILLED")
    assert not (store / "never-tracked").exists()


def test_a_data_set_that_another_run_makes_at_the_same_moment_is_logged_all_the_same(
    store: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_inputs, raced = SqlAlchemyStore._log_inputs_impl, []

    def late(self: SqlAlchemyStore, *given: object) -> object:
        """What MLflow's database says to the later of two inserts."""
        if not raced:
            raced.append(True)
            raise MlflowException("UNIQUE constraint failed: datasets.experiment_id", BAD_REQUEST)
        return log_inputs(self, *given)

    monkeypatch.setattr(SqlAlchemyStore, "_log_inputs_impl", late)
    with open_tracker(recipe_for(store), store / "raced", 0) as tracker:
        tracker.log_dataset("shards:train", "c" * 64, "s3://bucket/shards", "train", {})
    assert raced
    assert [one.dataset.name for one in client.get_run(tracker.run_id).inputs.dataset_inputs] == ["shards:train"]


def test_a_record_of_which_only_a_piece_was_written_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, write = Spool(tmp_path), os.write
    spool.append({"lane": "values", "metrics": {"loss": 1.0}, "step": 1})
    monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:10]))
    with pytest.raises(OSError, match="only part"):
        spool.append({"lane": "values", "metrics": {"loss": 2.0}, "step": 2})
    monkeypatch.undo()
    spool.append({"lane": "values", "metrics": {"loss": 3.0}, "step": 3})
    assert [record["step"] for record in spool.records()] == [1, 3]
