"""The search's space: conditions, ranges, the grid, and proposals that remember."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import tiny_recipe

from crossgate.cluster import explore, trials
from crossgate.cluster.explore import Proposed, exploration
from crossgate.cluster.space import Proposals, draws, grid, within
from crossgate.cluster.trials import (
    TrialRecord,
    known_trials,
    leaderboard,
    note_report,
    refused,
    reports_of,
    write_record,
)
from crossgate.config import Recipe
from crossgate.errors import Unreachable, UserError
from crossgate.recipe import parse_recipe

GATE = "model.fusion.name"
SPACE = {
    GATE: ["mean", "softmax", "sparse"],
    "model.fusion.temperature": {"low": 0.3, "high": 3.0, "log": True, "when": {GATE: ["softmax"]}},
    "model.fusion.top": {"values": [1, 2], "when": {GATE: ["sparse"]}},
    "model.fusion.hidden": {"low": 8, "high": 64, "integer": True},
}


def recipe_of(output: Path, **keys) -> Recipe:
    recipe = tiny_recipe(output, "study", tracking={"enabled": False}, search={"space": SPACE, "samples": 12, **keys})
    return recipe.model_copy(update={"kind": "search"})


def test_a_key_is_there_only_under_its_conditions(tmp_path):
    for point in draws(recipe_of(tmp_path).search, seed=3):
        assert ("model.fusion.temperature" in point) == (point[GATE] == "softmax")
        assert ("model.fusion.top" in point) == (point[GATE] == "sparse")
        assert 0.3 <= point.get("model.fusion.temperature", 1.0) <= 3.0
        assert point["model.fusion.hidden"] in range(8, 65) and isinstance(point["model.fusion.hidden"], int)


def test_the_grid_follows_conditions(tmp_path):
    space = {key: SPACE[key] for key in (GATE, "model.fusion.top")}
    points = list(grid(recipe_of(tmp_path, space=space, samples=0).search))
    tops = [{GATE: "sparse", "model.fusion.top": top} for top in (1, 2)]
    assert points == [{GATE: "mean"}, {GATE: "softmax"}, *tops]


def test_draws_are_distinct_and_follow_the_seed(tmp_path):
    config = recipe_of(tmp_path).search
    points = draws(config, 0)
    assert len(points) == 12 and points == draws(config, 0) != draws(config, 1)
    assert len({json.dumps(point) for point in points}) == 12


@pytest.mark.parametrize(
    ("space", "keys", "complaint"),
    [
        ({"optim.lr": {"low": 1.0, "high": 0.1}}, {}, "low must be smaller"),
        ({"optim.lr": {"low": 0.0, "high": 0.1, "log": True}}, {}, "above 0"),
        ({"optim.lr": {"low": 0.1, "high": 0.2}}, {"samples": 0}, "no grid: set search.samples"),
        ({"optim.lr": {"low": 0.1, "high": 0.2, "when": {GATE: ["mean"]}}}, {}, "no earlier list"),
        ({GATE: ["mean"], "optim.lr": {"values": [1.0], "when": {GATE: ["gmu"]}}}, {}, "never is"),
        ({GATE: ["mean"]}, {"searcher": "optuna", "samples": 0}, "search.samples"),
    ],
)
def test_a_space_that_cannot_be_is_refused(tmp_path, space, keys, complaint):
    with pytest.raises(UserError, match=complaint):
        recipe_of(tmp_path, space=space, **keys)


def test_a_recipe_with_a_space_survives_being_written(tmp_path):
    recipe = recipe_of(tmp_path)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def score(point) -> float:
    return {"mean": 0.5, "softmax": 0.9, "sparse": 0.2}[point[GATE]] - abs(point["model.fusion.hidden"] - 40) / 400


def test_optuna_tries_every_gate_once_and_then_the_good_ones(tmp_path):
    proposals = Proposals(recipe_of(tmp_path, samples=30).search, seed=0)
    points = []
    for _ in range(30):
        point = proposals.ask()
        points.append(point)
        proposals.tell(point, [], score(point), "finished")
    assert {point[GATE] for point in points[:3]} == {"mean", "softmax", "sparse"}
    assert len({json.dumps(point) for point in points}) == 30
    later = [point[GATE] for point in points[12:]]
    assert later.count("softmax") > len(later) / 2, later


def test_optuna_stops_when_a_small_space_is_used_up(tmp_path):
    proposals = Proposals(recipe_of(tmp_path, space={GATE: ["mean", "softmax"]}, samples=9).search, seed=0)
    assert [proposals.ask() is None for _ in range(3)] == [False, False, True]


def test_what_was_under_way_comes_again_and_what_ended_does_not(tmp_path):
    recipe = recipe_of(tmp_path, searcher="optuna", samples=8)
    first = exploration(recipe)
    drawn = [first.draw() for _ in range(5)]
    for (record, _), status in zip(drawn, ("finished", "pruned", "failed")):
        note_report(record.directory, 4, 0.25)
        write_record(record, status=status, value=None if status == "failed" else score(record.overrides), step=4)
        first.tell(next(one for one in known_trials(tmp_path / "study") if one.name == record.name))

    second = Proposed(recipe)
    assert second.left == 6  # two ended
    names = [record.name for record, _ in (second.draw() for _ in range(second.left))]
    assert sorted(names[:3]) == sorted(record.name for record, _ in drawn[2:])
    assert not set(names) & {record.name for record, _ in drawn[:2]}
    assert len(known_trials(tmp_path / "study")) == 8

    changed = recipe.model_copy(deep=True)
    changed.optim.weight_decay = 1.0
    assert Proposed(changed).left == 8  # other settings, other trials


TOGETHER = {"engine.zero_stage": [0, 2], "engine.precision": ["fp32", "bf16"]}  # bf16 needs stage 1 or more


@pytest.mark.parametrize("searcher", ["optuna", "random"])
def test_keys_that_do_not_go_together_are_a_failed_trial_and_the_search_goes_on(tmp_path, searcher):
    recipe = recipe_of(tmp_path, space=TOGETHER, searcher=searcher, samples=4)
    source = exploration(recipe)
    assert not (tmp_path / "study").exists(), "written before the search's folder is its own"
    drawn = [planned[0] for _ in range(5) if (planned := source.draw()) is not None]
    assert len(drawn) == 3 and {"engine.zero_stage": 0, "engine.precision": "bf16"} not in [r.overrides for r in drawn]
    failed = [one for one in known_trials(tmp_path / "study") if one.status == "failed"]
    assert len(failed) == 1 and "precision bf16 needs zero_stage" in failed[0].reason
    assert failed[0].name in {record.name for record in source.records()}
    assert len(exploration(recipe).records()) == 4


@pytest.mark.parametrize("searcher", ["optuna", "random"])
@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ({"engine.zero_stage": [0], "engine.precision": ["bf16", "fp16"]}, "precision .* needs zero_stage"),
        ({GATE: ["mean", "gmu"], "optim.lrr": {"values": [1.0], "when": {GATE: ["gmu"]}}}, "unknown key 'optim.lrr'"),
    ],
)
def test_a_space_without_a_possible_point_or_with_a_misspelt_key_is_refused(tmp_path, searcher, space, complaint):
    with pytest.raises(UserError, match=complaint):
        exploration(recipe_of(tmp_path, space=space, searcher=searcher, samples=2))


def test_points_that_are_refused_have_folders_of_their_own(tmp_path):
    recipe, error = recipe_of(tmp_path), UserError("no")
    point = {"model.fusion.one_key_with_a_long_name": "x" * 40, "model.fusion.another_key": 1}
    names = {refused(recipe, point | {"model.fusion.last": n}, error).name for n in (1, 2)}
    assert len(names) == 2 and names == {refused(recipe, point | {"model.fusion.last": n}, error).name for n in (1, 2)}


def test_an_index_that_does_not_answer_stops_the_start_and_is_opened_once(tmp_path, monkeypatch):
    opened: list[str] = []

    def index(recipe: Recipe) -> SimpleNamespace:
        opened.append(recipe.data.index)
        return SimpleNamespace(digest="1")

    monkeypatch.setattr(trials, "open_index", index)
    recipe = recipe_of(tmp_path, searcher="optuna", samples=4)
    recipe.data.index = "s3://clips"
    source = Proposed(recipe)
    for _ in range(4):
        source.draw()
    assert len(source.records()) == 4 and len(opened) == 1

    def away(recipe: Recipe) -> SimpleNamespace:
        raise Unreachable("does not answer", where="s3://clips")

    again = Proposed(recipe)
    again._digests.clear()
    again._mine.clear()
    monkeypatch.setattr(trials, "open_index", away)
    with pytest.raises(Unreachable):
        Proposed(recipe)
    with pytest.raises(Unreachable):
        again.records()
    with pytest.raises(Unreachable):
        again.draw()
    assert not [one for one in known_trials(tmp_path / "study") if one.status == "failed"]


def test_several_seeds_count_by_their_mean_and_before_one_lucky_seed(tmp_path):
    def record(name: str, value: float | None, status: str = "finished", **fields) -> TrialRecord:
        return TrialRecord(name, {GATE: name}, str(tmp_path / name), status, value, **fields)

    records = [
        record("lucky", 0.99),
        record("good", 0.9),
        record("good-seed1", 0.8, repeats="good"),
        record("stopped", 0.95, "pruned", step=4),
        record("stopped-later", 0.3, "pruned", step=8),
        record("broken", None, "failed", reason="out of memory"),
    ]
    (tmp_path / "lucky").mkdir()
    (tmp_path / "lucky" / "recipe.yaml").touch()
    result = leaderboard(recipe_of(tmp_path), records)
    assert [trial.name for trial in result.trials] == ["good", "lucky", "stopped-later", "stopped", "broken"]
    assert result.trials[0].value == pytest.approx(0.85)
    assert "2 seeds, 0.8000 to 0.9000" in result.table()
    assert "pruned at step 8" in result.table()
    assert result.columns()["seeds"] == [2, 1, 1, 1, 1]
    assert "run.name=lucky-again 'data.test=[]'" in result.columns()["command"][1]
    assert result.columns()["command"][4] == "", "a recipe that is not there"


def test_a_trials_command_survives_a_shell_wherever_the_search_is(tmp_path):
    folder = tmp_path / "my runs" / "one"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    words = shlex.split(TrialRecord("one", {}, str(folder)).command)
    assert words[2:] == ["--config", str(folder / "recipe.yaml"), "run.name=one-again", "data.test=[]"]


@pytest.mark.parametrize(
    ("point", "inside"),
    [
        ({GATE: "mean", "model.fusion.hidden": 8}, True),
        ({GATE: "softmax", "model.fusion.temperature": 1.0, "model.fusion.hidden": 64}, True),
        ({GATE: "softmax", "model.fusion.hidden": 64}, False),
        ({GATE: "mean", "model.fusion.temperature": 1.0, "model.fusion.hidden": 8}, False),
        ({GATE: "gmu", "model.fusion.hidden": 8}, False),
        ({GATE: "sparse", "model.fusion.top": 3, "model.fusion.hidden": 8}, False),
        ({GATE: "mean", "model.fusion.hidden": 65}, False),
        ({GATE: "mean", "model.fusion.hidden": 8.5}, False),
        ({GATE: "mean", "model.fusion.hidden": 8, "optim.lr": 0.1}, False),
        ({GATE: "mean"}, False),
    ],
)
def test_a_point_is_within_a_space_with_just_the_keys_that_vary_there(tmp_path, point, inside):
    assert within(recipe_of(tmp_path).search.space, point) is inside


def test_a_named_search_whose_space_is_another_leaves_the_trials_of_the_first_alone(tmp_path):
    first = Proposed(recipe_of(tmp_path, searcher="optuna", samples=6))
    for _ in range(6):
        record = first.draw()[0]
        write_record(record, status="finished", value=score(record.overrides))
    narrow = {key: value for key, value in SPACE.items() if key != "model.fusion.hidden"}
    changed = recipe_of(tmp_path, space=narrow, searcher="optuna", samples=3)
    second = Proposed(changed)
    assert second.records() == [] and second.left == 3
    names = {second.draw()[0].name for _ in range(3)}
    assert {one.name for one in second.records()} == names and len(known_trials(tmp_path / "study")) == 9
    wider = recipe_of(tmp_path, space=SPACE | {GATE: [*SPACE[GATE], "gmu"]}, searcher="optuna", samples=8)
    assert Proposed(wider).left == 2, "what a wider space has as well counts"


def test_what_a_name_says_is_read_once_however_often_the_board_looks(tmp_path, monkeypatch):
    source = Proposed(recipe_of(tmp_path, searcher="optuna", samples=4))
    for _ in range(4):
        source.draw()
    source.records()
    parsed: list[object] = []
    monkeypatch.setattr(explore, "trial_of", lambda *given, **keys: parsed.append(given))
    assert len(source.records()) == 4 and not parsed


def test_reports_are_kept_once_a_step_and_torn_lines_left_out(tmp_path):
    for step, value in ((2, 0.1), (4, 0.2), (4, 0.3)):
        note_report(tmp_path, step, value)
    with (tmp_path / "reports.jsonl").open("a") as file:
        file.write("[6, 0.")
    assert reports_of(tmp_path) == [(2, 0.1), (4, 0.3)]
