"""The search: its plan, its leaderboard, and trials under a real Ray Tune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray_head import job_environment, ray_head
from tiny_run import tiny_recipe

from crossgate.cli import main
from crossgate.cluster import ray_tune, trials
from crossgate.cluster.explore import plan
from crossgate.cluster.leaderboard import log_board
from crossgate.cluster.ray_tune import search
from crossgate.cluster.trials import SearchResult, TrialRecord, leaderboard, read_record, reports_of, write_record
from crossgate.config import Recipe
from crossgate.errors import Unreachable, UserError
from crossgate.recipe import dump_recipe
from crossgate.runs import ownership
from crossgate.tracking import NullTracker
from crossgate.training.checkpoint import refuse_other_run
from crossgate.training.metrics import MetricsFile, read_metrics
from crossgate.training.requests import Preempted

RATES = [0.0001, 0.03]


def own_lines(said: str) -> list[str]:
    """Without those that Ray, still connected for other tests, passes on from its workers: `(pid=123) ...`."""
    return [line for line in said.splitlines() if not line.startswith("(")]


def search_recipe(output: Path, **search_settings) -> Recipe:
    settings = {"space": {"optim.lr": RATES, "finetune.label_smoothing": [0.0, 0.9]}, "concurrent": 2}
    recipe = tiny_recipe(output, "study", tracking={"enabled": False}, search=settings | search_settings)
    return recipe.model_copy(update={"kind": "search"})


@pytest.mark.ray
def test_trials_are_ranked_failures_kept_and_finished_ones_not_run_again(tmp_path, ray_cluster):
    recipe = search_recipe(tmp_path, space={"optim.lr": [*RATES, 0.5]})
    recipe.tracking.uri = "http://ann:s3cret@host"
    result = search(recipe, "tiny_run:run_trial")
    assert result.best() == {"optim.lr": 0.03}
    assert [trial.status for trial in result.trials] == ["finished", "finished", "failed"]
    assert result.trials[0].value > result.trials[1].value
    assert result.trials[2].reason == "RuntimeError: this trial fails"
    assert (result.directories("optim.lr")["0.03"] / "model" / "w.pt").exists()
    assert "this trial fails" in result.table()

    assert search(recipe, "tiny_run:run_trial").trials[:2] == result.trials[:2]
    started = {path.name.split("-")[1]: path.read_text() for path in (tmp_path / "study").glob("*.started")}
    assert started == {"0.0001": "x", "0.03": "x", "0.5": "xx"}  # only the failed one was tried anew
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    assert "uri: http://***@host" in (tmp_path / "study" / "recipe.yaml").read_text()


@pytest.mark.ray
def test_what_was_explored_cheaply_is_trained_in_full_before_it_is_ranked(tmp_path, ray_cluster):
    space = {"optim.lr": [*RATES, 0.02]}
    recipe = search_recipe(tmp_path, space=space, explore={"training.steps": 4}, finalists=2)
    result = search(recipe, "tiny_run:run_trial")
    assert [trial.status for trial in result.trials] == ["finished"] * 2 + ["explored"] * 3
    assert {trial.overrides["optim.lr"] for trial in result.trials[:2]} == {0.03, 0.02}
    last = [max(line["step"] for line in read_metrics(Path(trial.directory))) for trial in result.trials]
    assert last == [12, 12, 4, 4, 4]
    assert "explored at step 4" in result.table()
    again = search(recipe, "tiny_run:run_trial")
    assert again.trials == result.trials
    assert {path.read_text() for path in (tmp_path / "study").glob("*.started")} == {"x"}, "nothing was run twice"


@pytest.mark.ray
def test_halving_prunes_what_is_behind_and_optuna_goes_on_where_it_was(tmp_path, ray_cluster):
    space = {"optim.lr": {"low": 1e-6, "high": 0.1, "log": True}, "finetune.label_smoothing": [0.0, 0.1]}
    keys = {"space": space, "samples": 6, "searcher": "optuna", "scheduler": "asha", "grace": 2, "reduction": 2.0}
    recipe = search_recipe(tmp_path, **keys)
    recipe.training.steps, recipe.training.eval_every = 12, 2
    first = search(recipe, "tiny_run:run_heard_trial")
    ended = [trial.status for trial in first.trials]
    assert len(ended) == 6 and "pruned" in ended and ended[0] == "finished"
    assert "failed" not in ended, "a trial died of the slow end of the one before it"
    started = sorted(path.name for path in (tmp_path / "study").glob("*.started"))
    pruned = next(trial for trial in first.trials if trial.status == "pruned")
    assert 0 < pruned.step < 12
    assert reports_of(pruned.directory)[-1] == (pruned.step, pruned.value)
    assert not (Path(pruned.directory) / "model").exists()

    more = recipe.model_copy(update={"search": recipe.search.model_copy(update={"samples": 8})})
    second = search(more, "tiny_run:run_heard_trial")
    kept = {trial.name: trial for trial in second.trials}
    assert len(kept) == 8 and all(kept[trial.name] == trial for trial in first.trials)
    again = [path.read_text() for path in (tmp_path / "study").glob("*.started") if path.name in started]
    assert again == ["x"] * 6  # nothing that had ended was run again
    assert (tmp_path / "study" / "figures" / "parallel_coordinates.png").exists()


def search_in_process(recipe: Recipe, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Searches in a process that may use two cores, whatever this machine has; returns what it printed."""

    def keep_to_two_cores() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    given = folder / "search.json"
    given.write_text(recipe.model_dump_json())
    words = [sys.executable, Path(__file__).with_name("search_process.py"), given, "tiny_run:run_slow_trial"]
    how: dict[str, Any] = {"env": environment, "preexec_fn": keep_to_two_cores}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=800, **how)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_of_several_ranks_take_turns_where_only_one_has_room(tmp_path):
    """Drivers of two trials are there at once, the workers of one: neither may wait for ever for the other."""
    keys = {"space": {"optim.lr": [0.03, 1e-6]}, "scheduler": "asha", "grace": 2, "reduction": 2.0}
    recipe = search_recipe(tmp_path, **keys)
    recipe.training.steps, recipe.training.eval_every = 12, 2
    recipe.cluster.workers = 2
    with ray_head(cpus=3) as head:
        recipe.cluster.address = head.cluster
        said = search_in_process(recipe, tmp_path, job_environment())
    last = {one.overrides["optim.lr"]: one for one in trials.known_trials(tmp_path / "study")}
    assert last[0.03].status == "finished" and last[1e-6].status in ("finished", "pruned"), said
    assert last[0.03].value > last[1e-6].value
    lines = read_metrics(Path(last[0.03].directory))
    assert max(line["step"] for line in lines) == 12 and reports_of(last[0.03].directory)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pruned_trial_of_several_ranks_gives_its_room_back(tmp_path):
    """On a Ray of its own, which has room for one trial and no state API to clean up by."""
    keys = {"space": {"optim.lr": [0.03, 1e-6, 0.02]}, "scheduler": "asha", "grace": 2, "reduction": 2.0}
    recipe = search_recipe(tmp_path, **keys, concurrent=1)
    recipe.training.steps, recipe.training.eval_every = 60, 2
    recipe.cluster.workers, recipe.cluster.address = 2, "local"
    said = search_in_process(recipe, tmp_path)
    last = {one.overrides["optim.lr"]: one for one in trials.known_trials(tmp_path / "study")}
    assert [last[rate].status for rate in (0.03, 1e-6)] == ["finished", "pruned"], said
    assert last[0.02].status in ("finished", "pruned") and last[0.02].step > 0, said
    assert not (Path(last[1e-6].directory) / "model").exists()
    assert max(line["step"] for line in read_metrics(Path(last[1e-6].directory))) < 60
    assert reports_of(last[1e-6].directory)[-1] == (last[1e-6].step, last[1e-6].value), "nothing was told afterwards"


def ended_search(output: Path, *statuses: str, **keys) -> Recipe:
    """A search whose trials have all ended, so that nothing is left for Ray to do."""
    rates = [0.01 * (place + 1) for place in range(len(statuses))]
    recipe = search_recipe(output, space={"optim.lr": rates}, **keys)
    for (record, settings), status in zip(plan(recipe)[0], statuses, strict=True):
        write_record(record, status=status, value=settings.optim.lr, step=12)
    return recipe


def test_what_a_killed_start_left_of_tunes_is_removed_at_the_next_one(tmp_path):
    recipe = ended_search(tmp_path, "finished", "pruned")
    left = tmp_path / "study" / ".ray" / "study-1" / "experiment_state.json"
    left.parent.mkdir(parents=True)
    left.write_text("http://ann:s3cret@host")
    search(recipe, "tiny_run:run_trial")
    assert not (tmp_path / "study" / ".ray").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("cannot be reached", where="tracking.uri http://mlflow"), "tracking.uri http://mlflow: cannot be"),
        (ConnectionResetError(), "ConnectionResetError"),  # without a word of its own
    ],
)
def test_a_tracking_server_that_is_away_at_the_end_takes_no_result_with_it(tmp_path, monkeypatch, caplog, error, said):
    recipe = ended_search(tmp_path, "finished", "pruned", "pruned")
    recipe.tracking.enabled = True

    def away(*given: object) -> None:
        assert (tmp_path / "study" / "leaderboard.json").exists()
        raise error

    monkeypatch.setattr(ray_tune, "conclude", away)
    monkeypatch.setattr(ray_tune, "open_tracker", lambda recipe, run_dir: NullTracker())
    result = search(recipe, "tiny_run:run_trial")
    assert result.best() == {"optim.lr": 0.01}
    assert {"results.json", "report.html"} <= {path.name for path in (tmp_path / "study").iterdir()}
    (warned,) = [one.message for one in caplog.records if one.name == "crossgate.search"]
    assert f"MLflow may lack the end of 3 trials ({said}" in warned


def test_the_board_is_kept_twice_a_minute_and_its_trouble_ends_nothing(tmp_path, monkeypatch, capsys, caplog):
    from crossgate.cluster import tuning

    now, kept = [100.0], []
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: now[0]))
    standing = SearchResult("val/accuracy", [TrialRecord("a", {"optim.lr": 0.1}, "a", "finished", 0.5)])

    def keep(result: SearchResult) -> None:
        kept.append(now[0])
        if len(kept) > 1:
            raise OSError("no space left")

    board = tuning.Board(lambda: standing, keep, total=2, logs="runs/s/TRIAL/log.txt")
    job = {"job": {"record": {"name": "b", "overrides": {"optim.lr": 0.2}, "directory": "b"}}}
    running = SimpleNamespace(is_finished=lambda: False, status="RUNNING", last_result={}, config=job)
    done = SimpleNamespace(is_finished=lambda: True, status="TERMINATED")
    board.on_trial_result(0, [running], running, {})
    running.last_result = {"step": 8, "value": 0.25}
    for moment in range(100, 200, 5):
        now[0] = float(moment)
        board.on_trial_result(0, [running, done], running, {})
    assert kept == [100.0, 130.0, 160.0, 190.0]
    assert [one.message for one in caplog.records if one.name == "crossgate.search"] == [
        "the leaderboard is not kept while the search goes on: no space left"
    ]
    said = "1/2 trials ended, best val/accuracy 0.5000: optim.lr=0.1, ETA "
    assert own_lines(capsys.readouterr().err) == [
        "2 trials to run; each writes to runs/s/TRIAL/log.txt",
        f"{said}0:10; under way: optim.lr=0.2 (step 8: 0.2500)",
        f"{said}1:10; under way: optim.lr=0.2 (step 8: 0.2500)",
    ], "when one has ended, and every minute"


def test_the_board_in_mlflow_is_a_table_that_is_written_over(tmp_path):
    logged: list[tuple[str, str]] = []
    tracker = NullTracker()
    tracker.log_text = lambda text, name: logged.append((name, text))
    for value in (0.5, 0.75):
        log_board(SearchResult("val/accuracy", [TrialRecord("a", {"optim.lr": 0.1}, "a", "finished", value)]), tracker)
    assert {name for name, _ in logged} == {"leaderboard_table.json"}
    table = json.loads(logged[-1][1])
    assert table["data"][0][table["columns"].index("val/accuracy")] == 0.75


def test_the_plan_is_the_grid_or_distinct_draws(tmp_path):
    planned, _ = plan(search_recipe(tmp_path))
    assert len(planned) == 4
    assert len({record.name for record, _ in planned}) == 4
    record, settings = planned[0]
    assert settings.kind == "finetune"
    assert settings.optim.lr == record.overrides["optim.lr"]
    assert Path(settings.run.output) / settings.run.name == Path(record.directory)
    draws, _ = plan(search_recipe(tmp_path, samples=3))
    assert len({record.name for record, _ in draws}) == 3
    assert [r.name for r, _ in draws] == [r.name for r, _ in plan(search_recipe(tmp_path, samples=3))[0]]
    assert len(plan(search_recipe(tmp_path, samples=99))[0]) == 4


def test_clips_packed_anew_give_new_trials(tmp_path, monkeypatch):
    digests = {"a": "1", "b": "2"}
    monkeypatch.setattr(trials, "open_index", lambda recipe: SimpleNamespace(digest=digests[recipe.data.index]))

    def names(index: str) -> set[str]:
        recipe = search_recipe(tmp_path)
        recipe.data.index = index
        return {record.name for record, _ in plan(recipe)[0]}

    before = names("a")
    assert names("a") == before
    assert not names("b") & before
    digests["a"] = "3"
    assert not names("a") & before


def test_a_second_start_of_a_search_is_refused_while_the_first_goes_on(tmp_path, monkeypatch):
    recipe = search_recipe(tmp_path)
    (tmp_path / "study").mkdir()
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.1)
    with ownership.only_start(tmp_path / "study"), pytest.raises(UserError, match="this run is going on already"):
        search(recipe, "tiny_run:run_trial")
    assert not (tmp_path / "study" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({"optim.lrr": [1.0]}, "unknown key 'optim.lrr'.*did you mean 'lr'"),
        ({"optim.lr": [-1.0]}, "optim.lr"),
        ({"optim.lr": []}, "nothing to try"),
        ({}, "nothing to try"),
    ],
)
def test_a_bad_space_is_refused_before_anything_starts(tmp_path, space, complaint):
    with pytest.raises(UserError, match=complaint):
        search(search_recipe(tmp_path, space=space), "tiny_run:run_trial")
    assert not (tmp_path / "study").exists()


def test_a_search_leaves_another_runs_folder_alone_and_may_be_given_other_settings(tmp_path):
    folder, recipe = tmp_path / "study", search_recipe(tmp_path)
    folder.mkdir()
    other = dump_recipe(recipe.model_copy(update={"kind": "finetune"}))
    (folder / "recipe.yaml").write_text(other)
    with pytest.raises(UserError, match=r"made with other settings.*another run\.name"):
        search(recipe, "tiny_run:run_trial")
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    assert (folder / "recipe.yaml").read_text() == other
    (folder / "recipe.yaml").write_text(dump_recipe(search_recipe(tmp_path, concurrent=1)))
    refuse_other_run(folder, recipe)


def test_a_search_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "open_index", lambda recipe: SimpleNamespace(digest="1"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run's folder .*check the path"):
        search(search_recipe(tmp_path / "file"), "tiny_run:run_trial")


def test_the_leaderboard_puts_failures_last_and_keeps_their_reason(tmp_path):
    def record(name: str, **fields) -> TrialRecord:
        return TrialRecord(name, {"model.fusion.name": name}, str(tmp_path / name), **fields)

    records = [
        record("mean", status="failed", reason="out of memory"),
        record("gmu", status="finished", value=0.5, seconds=3),
        record("softmax", status="finished", value=0.75, seconds=4),
    ]
    result = leaderboard(search_recipe(tmp_path), records)
    assert [trial.name for trial in result.trials] == ["softmax", "gmu", "mean"]
    assert result.best() == {"model.fusion.name": "softmax"}
    assert list(result.directories("model.fusion.name")) == ["softmax", "gmu"]
    assert result.table().splitlines() == [
        "rank  val/accuracy  time  trial",
        "   1        0.7500   4 s  model.fusion.name=softmax",
        "   2        0.5000   3 s  model.fusion.name=gmu",
        "   3        failed   0 s  model.fusion.name=mean  (out of memory)",
    ]


def test_a_search_in_which_every_trial_failed_fails_after_its_table(tmp_path, monkeypatch, capsys):
    failed = TrialRecord("a", {"optim.lr": 0.1}, "a", status="failed", reason="no such backbone")
    monkeypatch.setattr(ray_tune, "search", lambda recipe: SearchResult("val/accuracy", [failed]))
    path = tmp_path / "search.yaml"
    path.write_text("kind: search\n")
    monkeypatch.setattr("sys.argv", ["crossgate", "search", "--config", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "optim.lr=0.1  (no such backbone)" in said.out
    assert own_lines(said.err) == ["crossgate: search: no trial finished; no such backbone"]


def test_a_trial_outlives_a_store_that_is_down_for_a_while(tmp_path):
    recipe, starts = search_recipe(tmp_path), []

    def run(recipe: Recipe) -> dict[str, int]:
        starts.append(1)
        if len(starts) <= 3:
            raise Unreachable("storage failed")
        return {"step": 3}

    assert ray_tune._through_outages(run, recipe) == {"step": 3}
    starts.clear()
    recipe.cluster.max_failures = 2
    with pytest.raises(Unreachable):
        ray_tune._through_outages(run, recipe)
    assert len(starts) == 3


def job_of(record: TrialRecord, settings: Recipe, halving: bool = False) -> dict[str, Any]:
    return {"record": asdict(record), "recipe": settings.model_dump(mode="json"), "halving": halving}


@pytest.mark.parametrize(("halving", "status", "step"), [(True, "pruned", 2), (False, "finished", 4)])
def test_a_pruned_trial_ends_as_such_and_may_be_trained_in_full_later(tmp_path, halving, status, step):
    """Among the finalists stands uniform averaging, which halving may have stopped."""
    record, settings = plan(search_recipe(tmp_path))[0][0]
    write_record(record, status="pruned", value=0.1, step=2)

    def run(recipe: Recipe) -> dict[str, int]:
        MetricsFile(Path(record.directory), resume_step=0).write(4, {"val/accuracy": 0.5})
        return {"step": 4}

    ray_tune._recorded(job_of(record, settings, halving), run)
    assert (read_record(record).status, read_record(record).step) == (status, step)

    def stopped(recipe: Recipe) -> dict[str, int]:
        raise Preempted(143)

    if halving:
        ray_tune._recorded(job_of(record, settings, halving), stopped)
        assert read_record(record).status == "pruned"
    else:
        with pytest.raises(Preempted):
            ray_tune._recorded(job_of(record, settings, halving), stopped)


@pytest.mark.parametrize("last", [float("nan"), float("inf")])
def test_a_trial_without_a_finite_value_has_failed_and_says_so(tmp_path, last):
    record, settings = plan(search_recipe(tmp_path))[0][0]

    def run(recipe: Recipe) -> dict[str, int]:
        metrics = MetricsFile(Path(record.directory), resume_step=0)
        metrics.write(2, {"val/accuracy": 0.5})
        metrics.write(4, {"val/accuracy": last})
        return {"step": 4}

    Path(record.directory).mkdir(parents=True)
    ray_tune._recorded(job_of(record, settings), run)
    found = read_record(record)
    assert (found.status, found.value) == ("failed", None)
    assert found.reason == "val/accuracy is not a finite number at step 4"


def test_a_trial_that_has_finished_is_not_called_pruned_afterwards(tmp_path):
    from crossgate.cluster.tuning import STEP, VALUE, Halving

    scheduler = Halving(grace=2, reduction=2.0)
    for name, done in (("first", "waiting"), ("late", "waiting"), ("whole", "finished")):
        record = TrialRecord(name, {}, str(tmp_path / name))
        write_record(record, status=done, value=0.1 if done == "finished" else None, step=4)
        trial = SimpleNamespace(trial_id=name, config={"job": {"record": asdict(record)}})
        scheduler.on_trial_add(None, trial)
        decision = scheduler.on_trial_result(None, trial, {STEP: 2, VALUE: 0.9 if name == "first" else 0.1})
        expected = {"first": ("CONTINUE", "waiting"), "late": ("STOP", "pruned"), "whole": ("STOP", "finished")}
        assert (decision, read_record(record).status) == expected[name]


def test_without_a_finished_trial_there_is_no_best():
    failed = TrialRecord("a", {}, "a", status="failed", reason="no such backbone")
    with pytest.raises(UserError, match="no trial finished.*no such backbone"):
        SearchResult("val/accuracy", [failed]).best()
