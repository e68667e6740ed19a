"""A search that explores cheaply: what halving spares, what is ranked, and what is shown of it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_recipe

from crossgate.cluster import leaderboard as boards
from crossgate.cluster import ray_tune
from crossgate.cluster.explore import Exploration, Finals, exploration, plan
from crossgate.cluster.leaderboard import publish
from crossgate.cluster.ray_tune import _Stage, search
from crossgate.cluster.trials import SearchResult, TrialRecord, leaderboard, read_record, write_record
from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.evaluation import read_results
from crossgate.recipe import with_overrides
from crossgate.tracking import NullTracker

RATES = [0.01, 0.02, 0.03, 0.04]
CHEAP = {"training.steps": 4, "training.eval_every": 2}


def study(output: Path, **keys: Any) -> Recipe:
    settings = {"space": {"optim.lr": RATES}, "explore": CHEAP, "finalists": 2}
    recipe = tiny_recipe(output, "study", tracking={"enabled": False}, search=settings | keys)
    return recipe.model_copy(update={"kind": "search"})


def explored(recipe: Recipe) -> list[TrialRecord]:
    """Writes that every trial was explored: the larger the rate, the better."""
    trials = plan(with_overrides(recipe, recipe.search.explore))[0]
    for record, settings in trials:
        write_record(record, status="finished", value=settings.optim.lr, step=4)
    return [read_record(record) for record, _ in trials]


def board(output: Path, *statuses: str) -> SearchResult:
    values = {"failed": None}
    records = [
        TrialRecord(
            f"t{n}", {"optim.lr": RATES[n % 4]}, str(output / f"t{n}"), status, values.get(status, 0.5 + n / 100)
        )
        for n, status in enumerate(statuses)
    ]
    return leaderboard(study(output), records)


@pytest.mark.parametrize(("given", "grace"), [({}, 2), ({"grace": 3}, 3), ({"scheduler": "none"}, 0)])
def test_halving_spares_a_trial_until_its_first_validation_as_it_is_explored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], grace: int
) -> None:
    seen: list[int] = []

    def run(self: _Stage, source: Exploration, grace: int = 0, unit: str = "trials") -> None:
        seen.append(grace)

    monkeypatch.setattr(_Stage, "_run", run)
    recipe = study(tmp_path, **{"scheduler": "asha"} | given)
    recipe.training.eval_every = 12
    stage = _Stage(recipe, "tiny_run:run_trial", NullTracker(), ExitStack())
    stage.explore(exploration(recipe))
    stage.repeat(Finals([], list))
    assert seen == [grace, 0]


def test_finals_that_all_failed_have_no_best_however_good_the_exploration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = study(tmp_path)
    explored(recipe)

    def fails(self: _Stage, finals: Finals) -> None:
        while (planned := finals.draw()) is not None:
            write_record(planned[0], status="failed", reason="out of memory")

    monkeypatch.setattr(_Stage, "repeat", fails)
    with pytest.raises(UserError, match=r"leaderboard\.json: no trial finished \(out of memory\); mend it"):
        search(recipe, "tiny_run:run_trial")
    numbers, _ = read_results(tmp_path / "study" / "results.json")
    assert numbers["search/trials"] == 6 and math.isnan(numbers["search/best"])


def test_the_best_is_one_that_was_trained_in_full(tmp_path: Path) -> None:
    result = board(tmp_path, "explored", "finished", "explored")
    assert result.winner is not None and result.winner.name == "t1"
    assert result.best() == {"optim.lr": RATES[1]}
    (tmp_path / "study").mkdir()
    publish(study(tmp_path), result, None, NullTracker())
    assert read_results(tmp_path / "study" / "results.json")[0]["search/best"] == 0.51
    assert board(tmp_path, "explored", "failed").winner is None


@pytest.mark.parametrize(
    ("statuses", "drawn"),
    [
        (["explored"] * 5 + ["pruned", "failed", "finished", "finished"], "explored"),
        (["finished"] * 5 + ["pruned", "failed"], "finished"),
    ],
)
def test_figures_show_trials_of_one_fidelity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[str], drawn: str
) -> None:
    seen: dict[str, list[float | None]] = {}

    def parallel(points: list[dict], values: list[float | None], metric: str) -> str:
        seen["lines"] = values
        return metric

    def shares(points: list[dict], values: list[float]) -> dict[str, float]:
        seen["forest"] = list(values)
        return {"optim.lr": 1.0}

    monkeypatch.setattr(boards, "parallel_coordinates", parallel)
    monkeypatch.setattr(boards, "importances", shares)
    figures = boards._figures(board(tmp_path, *statuses))
    assert seen["lines"] == [0.54, 0.53, 0.52, 0.51, 0.5, None] and seen["forest"] == seen["lines"][:5]
    said = [words for _, words in figures.values()]
    assert ["those of the exploration" in one for one in said] == [drawn == "explored"] * 2
    assert f"differences between {drawn} trials" in said[1]


def test_finals_are_those_that_have_not_finished_and_each_is_listed_once(tmp_path: Path) -> None:
    recipe = study(tmp_path)
    before = explored(recipe)
    trials = plan(recipe)[0]
    write_record(trials[0][0], status="finished", value=0.5)
    write_record(trials[1][0], status="pruned", value=0.5)
    same = [replace(before[0], status="explored")]
    finals = Finals([*trials[:2], (before[0], recipe)], lambda: same)
    assert finals.left == 1
    drawn = finals.draw()
    assert drawn is not None and drawn[0].name == trials[1][0].name and finals.draw() is None
    names = [record.name for record in finals.records()]
    assert len(names) == len(set(names)) == 3


def test_no_boards_pile_up_while_the_server_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(NullTracker):
        away = True

    tracker, kept = Away(), []
    monkeypatch.setattr(ray_tune, "log_board", lambda result, tracker: kept.append(result))
    stage, result = _Stage(study(tmp_path), "tiny_run:run_trial", tracker, ExitStack()), board(tmp_path, "explored")
    stage._keep(result)
    assert not kept
    tracker.away = False
    stage._keep(result)
    assert kept == [result]
