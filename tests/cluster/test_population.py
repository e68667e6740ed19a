"""Population based training: who takes over from whom, what is on disk after any kill, and the replay of a schedule."""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import planted_run
import pytest
import torch
from tiny_run import run_member, tiny_recipe

from crossgate.cluster import population
from crossgate.cluster.exchange import continued, courses_of, explored, settings_of, takeovers
from crossgate.cluster.explore import exploration
from crossgate.cluster.population import Population
from crossgate.cluster.ray_tune import _finals, _recorded
from crossgate.cluster.trials import (
    SCHEDULE,
    NotYet,
    Planned,
    SearchResult,
    TrialRecord,
    leaderboard,
    read_record,
    write_record,
)
from crossgate.config import Range, Recipe
from crossgate.errors import UserError
from crossgate.evaluation.selection import Answers
from crossgate.model.store import read_card
from crossgate.recipe import load_recipe, parse_recipe
from crossgate.runs import context, finetune
from crossgate.training.metrics import read_metrics

RATES = {"low": 1e-4, "high": 0.1, "log": True}
SPACE = {"optim.lr": RATES, "model.fusion.modality_dropout": [0.0, 0.1, 0.2, 0.4]}


def recipe_of(output: Path, **keys: Any) -> Recipe:
    search = {"space": SPACE, "samples": 4, "scheduler": "pbt", "interval": 4, **keys}
    training = {"steps": 12, "eval_every": 2, "save_every": 12, "log_every": 4}
    recipe = tiny_recipe(output, "study", tracking={"enabled": False}, training=training, search=search)
    return parse_recipe(recipe.model_dump(mode="json") | {"kind": "search"})


def test_a_round_parses_each_recipe_once_however_often_the_board_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Population(recipe_of(tmp_path))
    source.records()
    parsed: list[object] = []
    monkeypatch.setattr(population, "trial_of", lambda *given, **keys: parsed.append(given))
    assert len(source.records()) == 4 and not parsed


# ---- exchange --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_worst_take_over_from_the_best_and_from_nobody_else(seed: int) -> None:
    source = random.Random(seed)
    values: dict[str, float | None] = {f"t{n}": source.choice([source.random(), None, 0.5]) for n in range(9)}
    values["t0"] = 0.1
    known = {name: value for name, value in values.items() if value is not None}
    best, found = sorted(known, key=lambda name: (-known[name], name))[:2], takeovers(values, 0.25, source)
    assert set(found.values()) <= set(best) and not set(found) & set(found.values())
    assert {name for name in values if values[name] is None} <= set(found)
    for taker, giver in found.items():
        assert taker not in known or known[giver] > known[taker]
    assert sum(name in known for name in found) <= 2


def test_equals_and_lone_survivors_go_on_by_themselves() -> None:
    source = random.Random(0)
    assert takeovers({"a": 1.0, "b": 1.0}, 0.5, source) == {}
    assert takeovers({"a": None, "b": None}, 0.25, source) == {}
    assert takeovers({"a": 0.2, "b": None, "c": 0.1}, 0.25, source) == {"b": "a"}
    assert takeovers({"a": 0.2, "b": 0.3, "c": 0.1}, 0.25, source) == {"c": "b"}


def test_explored_settings_are_other_ones_within_the_space() -> None:
    space = {"a": Range(**RATES), "b": [0.0, 0.1, 0.4]}
    seen = []
    for seed in range(200):
        found = explored({"a": 0.09, "b": 0.1}, space, 0.0, random.Random(seed))
        assert found["a"] in (0.072, 0.1) and found["b"] in (0.0, 0.4), "a step to the side, inside the bounds"
        assert explored({"b": 0.4}, {"b": space["b"]}, 0.0, random.Random(seed)) == {"b": 0.1}
        seen.append(explored({"a": 0.09, "b": 0.4}, space, 1.0, random.Random(seed)))
        assert seen[-1] != {"a": 0.09, "b": 0.4} and 1e-4 <= seen[-1]["a"] <= 0.1
    assert len({one["a"] for one in seen}) > 190 and {one["b"] for one in seen} == {0.0, 0.1, 0.4}
    assert explored({"b": 1.0}, {"b": [1.0]}, 0.5, random.Random(0)) == {"b": 1.0}


def test_a_lineage_keeps_its_changes_and_only_them() -> None:
    first = continued({"a": 1.0, "b": 2.0}, 4, {"a": 1.2, "b": 2.0})
    assert first[SCHEDULE] == [{"after": 4, "settings": {"a": 1.2}}]
    assert continued(first, 8, {"a": 1.2, "b": 2.0}) == first
    second = continued(first, 8, {"a": 1.2, "b": 1.6})
    assert settings_of(second) == {"a": 1.2, "b": 1.6} and settings_of(first) == {"a": 1.2, "b": 2.0}


def test_a_schedule_is_told_in_words_and_has_a_column_of_its_own() -> None:
    changes = [{"after": 4, "settings": {"optim.lr": 0.02}}, {"after": 8, "settings": {"optim.lr": 0.03, "b": 0.1}}]
    record = TrialRecord("a", {"optim.lr": 0.01, "b": 0.0, SCHEDULE: changes}, "a", "finished", 0.5)
    words = "after 4 optim.lr=0.02; after 8 optim.lr=0.03, b=0.1"
    assert record.settings == f"optim.lr=0.01, b=0.0, then {words}"
    columns = SearchResult("val/accuracy", [record, TrialRecord("b", {"optim.lr": 0.1, "b": 0.2}, "b")]).columns()
    assert columns["schedule"] == [words, ""] and SCHEDULE not in columns and columns["optim.lr"] == [0.01, 0.1]
    assert courses_of(record.overrides) == {"optim.lr": [(0, 0.01), (4, 0.02), (8, 0.03)], "b": [(0, 0.0), (8, 0.1)]}


# ---- rounds ----------------------------------------------------------------------------------------------------


def work(planned: Planned) -> None:
    """Does what Tune's process does with a stretch of a trial."""
    record, settings = planned
    job = {"record": asdict(record), "recipe": settings.model_dump(mode="json"), "halving": False}
    pause = {"until": record.until} if record.until < 12 else {}
    _recorded(job, lambda recipe: run_member(recipe, **pause))


def finish(recipe: Recipe, stretches: int = 99) -> Population:
    """Runs so many stretches of a population, or all."""
    source = Population(recipe)
    while stretches and (planned := source.draw()) is not None:
        work(planned)
        source.tell(planned[0])
        stretches -= 1
    return source


def result_of(source: Population) -> dict[str, tuple]:
    found = {}
    for record in source.records():
        lines = [(line["step"], line.get("val/accuracy")) for line in read_metrics(Path(record.directory))]
        found[record.name] = (record.overrides, record.status, record.value, record.step, lines)
    return found


def sums_of(source: Population) -> dict[str, float]:
    """Sums of all weights; kernels round by where memory lies, and a lost random state moves them by far more."""
    found = {}
    for record in source.records():
        weights = torch.load(Path(record.directory) / "model" / "w.pt", weights_only=True)
        found |= {f"{record.name} {name}": value.double().sum().item() for name, value in weights.items()}
    return found


def test_a_population_that_is_killed_anywhere_ends_as_one_that_is_not(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "whole")
    whole = finish(recipe)
    expected = result_of(whole)
    assert whole.left == 4 * 3 and {one[1] for one in expected.values()} == {"finished"}
    scheduled = [one for one in whole.records() if SCHEDULE in one.overrides]
    assert scheduled and all(change["after"] in (4, 8) for one in scheduled for change in one.overrides[SCHEDULE])

    again = recipe_of(tmp_path / "torn")
    left = []
    for stretches in (1, 3, 2):
        left.append(finish(again, stretches).left)
    torn = Population(again)
    planned = torn.draw()
    assert planned is not None  # handed out, and the search killed before it ended
    assert left == [12, 11, 8] and torn.left == 6
    ended = finish(again)
    assert result_of(ended) == expected
    assert sums_of(ended) == pytest.approx(sums_of(whole), rel=0, abs=1e-5)
    assert Population(again).left == 0 and Population(again).draw() is None

    best = max(scheduled, key=lambda record: record.value or 0.0)
    replayed = load_recipe(Path(best.directory) / "recipe.yaml", [f"run.name={best.name}-again"])
    assert run_member(replayed)["step"] == best.step
    lines = [(line["step"], line.get("val/accuracy")) for line in read_metrics(Path(f"{best.directory}-again"))]
    assert lines == expected[best.name][4], "the schedule is not what made the trial's numbers"


def test_a_takeover_that_was_cut_short_is_done_again_and_before_its_donor_goes_on(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    source = finish(recipe, 4)
    planned = source.draw()  # decides the round
    assert planned is not None
    last = source._rounds[-1]
    ((taker, donor),) = last.donors.items()
    folder = tmp_path / "study" / taker
    adopted = (folder / "metrics.jsonl").read_text()
    assert adopted == (tmp_path / "study" / donor / "metrics.jsonl").read_text()
    record, before = read_record(source._planned(taker)[0]), {"optim.lr": 1e-3}

    def tear() -> None:
        """Leaves the folder as a kill between the journal and the end of the takeover does."""
        write_record(record, overrides=before)
        shutil.rmtree(folder / "checkpoints")
        (folder / "metrics.jsonl").unlink()

    tear()
    assert Population(recipe).draw() is not None
    assert (folder / "metrics.jsonl").read_text() == adopted
    assert [path.name for path in (folder / "checkpoints").glob("step-*4")] == ["step-00000004"]
    tear()
    shutil.rmtree(tmp_path / "study" / donor / "checkpoints")
    with pytest.raises(UserError, match=f"its checkpoint of step 4 is gone, which {taker} goes on from"):
        Population(recipe).draw()


def test_a_trial_that_fails_takes_over_and_no_round_begins_before_the_last_has_ended(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, space={"optim.lr": [0.5, 0.02, 0.01, 0.03]}, resample=0.0)
    source = Population(recipe)
    first = [source.draw() for _ in range(4)]
    with pytest.raises(NotYet):
        source.draw()
    for planned in first:
        assert planned is not None
        work(planned)
        source.tell(planned[0])
    failing = next(record.name for record in source.records() if record.overrides["optim.lr"] == 0.5)
    while (planned := source.draw()) is not None:
        work(planned)
        source.tell(planned[0])
    records = {record.name: record for record in source.records()}
    assert {record.status for record in records.values()} == {"finished"}
    rounds = source._rounds
    assert rounds[1].values[failing] is None and failing in rounds[1].donors
    assert records[failing].overrides["optim.lr"] != 0.5


def test_a_members_time_is_that_of_all_its_stretches(tmp_path: Path) -> None:
    source = Population(recipe_of(tmp_path))
    while (planned := source.draw()) is not None:
        work(planned)
        write_record(read_record(planned[0]), seconds=planned[0].seconds + 100.0)
        source.tell(planned[0])
    assert {record.seconds for record in source.records()} == {300.0}


def test_of_equal_trials_the_one_with_fewer_changes_is_first_and_idle_changes_are_named(tmp_path: Path) -> None:
    late = {"optim.lr": 0.1, SCHEDULE: [{"after": 8, "settings": {"optim.lr": 0.08}}]}
    done = {"directory": "d", "status": "finished", "value": 0.5}
    records = [TrialRecord("taker", late, step=8, **done), TrialRecord("donor", {"optim.lr": 0.1}, step=8, **done)]
    board = leaderboard(recipe_of(tmp_path), records)
    assert [record.name for record in board.trials] == ["donor", "taker"]
    assert "its weights are of step 8, before the last change" in board.table()
    kept = leaderboard(recipe_of(tmp_path), [TrialRecord("taker", late, step=9, **done)])
    assert "before the last change" not in kept.table()


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"space": {"model.fusion.name": ["mean"]}}, r"'model.fusion.name' cannot change.*one of optim.lr.*asha"),
        ({"space": {"optim.lr": {"values": [0.1, 0.2], "when": {}}}, "samples": 3}, "2 points, fewer than the 3"),
        ({"samples": 1}, "set search.samples to 2"),
        ({"searcher": "optuna"}, "leave search.searcher at random"),
        ({"interval": 3}, "search.interval 3 is not a multiple of training.eval_every 2"),
        ({"space": {"model.fusion.modality_dropout": [0.0, 0.1, 0.2, 5.0]}, "samples": 2}, "modality_dropout.*5.0"),
    ],
)
def test_what_a_population_cannot_do_is_refused(tmp_path: Path, keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        exploration(recipe_of(tmp_path, **keys))


def test_the_best_schedules_are_run_with_other_seeds(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, seeds=3, finalists=2)
    records = finish(recipe).records()
    finals = _finals(recipe, records)
    best = [record.name for record in leaderboard(recipe, records).trials[:2]]
    ends, held = ("", "-seed1", "-seed2"), leaderboard(recipe, records).trials[0]
    assert [record.name for record, _ in finals[:6]] == [f"{name}{end}" for name in best for end in ends]
    assert [record.repeats for record, _ in finals[:6]] == ["", best[0], best[0], "", best[1], best[1]]
    if SCHEDULE in held.overrides:  # is it the schedule, or where it ends?
        assert [record.overrides for record, _ in finals[6:]] == [settings_of(held.overrides)] * 3
    for record, settings in finals:
        assert settings.model_dump(mode="json")["training"]["schedule"] == record.overrides.get(SCHEDULE, [])


def test_the_model_is_kept_with_the_settings_that_it_was_the_best_with(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(context, "open_index", context.open_index)  # put back what a planted trial replaces
    monkeypatch.setattr(finetune, "keep_features", finetune.keep_features)
    worse = {"after": 60, "settings": {"model.fusion.temperature": 500.0, "optim.lr": 1e-9}}
    settings = planted_run.tree(tmp_path, "noisy") | {"kind": "finetune", "tracking": {"enabled": False}}
    settings["training"] = {"steps": 80, "eval_every": 20, "log_every": 20, "save_every": 80, "schedule": [worse]}
    recipe = parse_recipe(settings)
    kept = planted_run.run_trial(recipe, lambda step, metrics: None, "")
    assert kept["step"] <= 60
    card = read_card(tmp_path / "noisy" / "model")
    assert card.model.fusion.temperature == 1.0
    answers = Answers.read(tmp_path / "noisy")
    assert answers is not None
    assert (answers.logits.argmax(1) == answers.labels).mean() == pytest.approx(kept["value"])
