"""Who has won: which seeds count, what becomes of a lost one, and what the sentence says beside p."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_recipe

from crossgate.cluster.explore import Proposed
from crossgate.cluster.leaderboard import _answers, averages, verdict_on
from crossgate.cluster.ray_tune import _finals
from crossgate.cluster.trials import TrialRecord, leaderboard, read_record, trial_of, write_record
from crossgate.config import Recipe, SearchConfig
from crossgate.evaluation.selection import Answers, Verdict
from crossgate.model.fusion import FUSIONS
from crossgate.runs.fusions import AVERAGES, GATE, average_for


def recipe_of(output: Path) -> Recipe:
    keys = {"space": {GATE: ["mean", "softmax", "gmu"]}, "scheduler": "asha", "seeds": 3, "finalists": 2}
    recipe = tiny_recipe(output, "study", tracking={"enabled": False}, search=keys)
    return recipe.model_copy(update={"kind": "search"})


def trial(output: Path, gate: str, value: float, status: str = "finished", seed: int = 0, **more: Any) -> TrialRecord:
    """A trial that answered right so often, on 40 groups of 5 clips."""
    name = f"{gate}-seed{seed}" if seed else gate
    record = TrialRecord(name, {GATE: gate}, str(output / name), status, value, repeats=gate if seed else "", **more)
    if status == "finished":
        count, source = 200, np.random.default_rng(sum(map(ord, name)))
        labels = np.tile([0, 1], count // 2)
        right = source.permutation(count) < round(value * count)
        logits = np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)]
        keys = np.array([f"video-{i:04d}" for i in range(count)])
        Path(record.directory).mkdir(parents=True)
        Answers(logits, labels, np.repeat(np.arange(40), 5), keys).write(record.directory)
    return record


def judged(output: Path, records: list[TrialRecord]) -> Verdict:
    recipe = recipe_of(output)
    verdict = verdict_on(recipe, leaderboard(recipe, records), records)
    assert verdict is not None
    return verdict


def test_the_sentence_says_how_many_were_pruned_and_are_not_counted(tmp_path: Path) -> None:
    records = [trial(tmp_path, "mean", 0.6), trial(tmp_path, "softmax", 0.9)]
    assert "pruned" not in judged(tmp_path, records).said
    records += [trial(tmp_path, f"gate{n}", 0.5, "pruned", step=4) for n in range(3)]
    found = judged(tmp_path, records)
    assert abs(found.difference - 0.3) < 1e-6
    assert "best of 1 that finished" in found.said and "; 3 trials pruned early not counted" in found.said


@pytest.mark.parametrize("better", ["average_logits", "average_probabilities", "mean"])
def test_the_best_average_is_what_a_gate_must_beat(tmp_path: Path, better: str) -> None:
    others = [name for name in AVERAGES if name != better]
    records = [trial(tmp_path, "softmax", 0.9), trial(tmp_path, better, 0.8)]
    records += [trial(tmp_path, name, 0.6) for name in others if name != "mean"]
    records += [trial(tmp_path, "mean", 0.7)] if better != "mean" else []
    found = judged(tmp_path, records)
    assert abs(found.difference - 0.1) < 1e-6 and f"over uniform averaging ({better}), 1 seed," in found.said
    best = judged(tmp_path, records[1:])
    assert best.said == f"no gate beat averaging: the best is uniform averaging ({better}) itself"


def test_each_fusion_is_compared_with_the_average_of_what_it_mixes() -> None:
    of_scores = {name for name, fusion in FUSIONS.items() if fusion.needs_logits}
    assert {name for name in FUSIONS if average_for(name) == "average_probabilities"} == of_scores


def test_what_mixes_class_scores_is_compared_with_their_average(tmp_path: Path) -> None:
    records = [trial(tmp_path, "softmax_logits", 0.9), trial(tmp_path, "mean", 0.5)]
    alone = judged(tmp_path, records)
    assert not alone.beats and math.isnan(alone.difference)
    assert "average_probabilities, which model.fusion.name=softmax_logits must be better than" in alone.said
    found = judged(tmp_path, [*records, trial(tmp_path, "average_probabilities", 0.8)])
    assert abs(found.difference - 0.1) < 1e-6


@pytest.mark.parametrize("fusion", ["concat", "fixed_logits", "static"])
def test_a_fusion_without_a_gate_is_called_so_however_good_it_is(tmp_path: Path, fusion: str) -> None:
    records = []
    for seed in range(4):
        for name, value in ((fusion, 0.9), ("mean", 0.5), ("average_probabilities", 0.5), ("softmax", 0.6)):
            records.append(trial(tmp_path, name, value, seed=seed))
    found = judged(tmp_path, records)
    assert found.p < 0.05 and not found.beats
    assert found.said.startswith(f"no gate beat averaging: the best is the fusion {fusion}, which is no gate: ")


def test_three_seeds_that_count_name_a_gate_and_two_do_not(tmp_path: Path) -> None:
    records = [trial(tmp_path, name, value, seed=s) for s in range(3) for name, value in (("mean", 0.5), ("gmu", 0.9))]
    two = judged(tmp_path, records)
    assert not two.beats and "2 seeds" in two.said and "luck between trainings is not excluded" in two.said
    records += [trial(tmp_path, name, value, seed=3) for name, value in (("mean", 0.5), ("gmu", 0.9))]
    three = judged(tmp_path, records)
    assert three.beats and three.said.startswith("model.fusion.name=gmu beats averaging: +40.0 points")


def test_videos_are_judged_where_videos_are_on_the_board(tmp_path: Path) -> None:
    recipe, record = recipe_of(tmp_path), trial(tmp_path, "mean", 0.5)
    assert [len(one.keys) for one in _answers(recipe, record, []).values()] == [200]
    recipe.evaluation.unit = "video"
    assert [len(one.keys) for one in _answers(recipe, record, []).values()] == [40]


def test_a_binary_task_is_judged_by_its_positive_class(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    recipe.search.metric = "val/average_precision"
    records = [trial(tmp_path, "mean", 0.5), trial(tmp_path, "gmu", 0.9)]
    found = verdict_on(recipe, leaderboard(recipe, records), records, ["calm", recipe.finetune.positive])
    assert found is not None and found.difference > 0.2 and "points of average precision" in found.said


def test_the_finals_have_every_average_that_was_tried_and_those_of_what_the_finalists_mix(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    recipe.search = SearchConfig(space={GATE: ["average_logits", "gmu", "softmax_logits"]}, seeds=2, finalists=2)

    def finals(*found: TrialRecord) -> list[tuple[Any, bool]]:
        return [(record.overrides[GATE], record.added) for record, _ in _finals(recipe, found)]

    gmu, late = trial(tmp_path, "gmu", 0.9), trial(tmp_path, "softmax_logits", 0.8)
    tried, _ = trial_of(recipe, {GATE: "average_logits"})
    tried = replace(tried, status="pruned", value=0.4, step=4)
    assert finals(gmu, tried) == [("gmu", False)] * 2 + [("average_logits", False)] * 2 + [("mean", True)] * 2
    added = [("average_probabilities", True)] * 2 + [("mean", True)] * 2
    assert finals(gmu, late) == [("gmu", False)] * 2 + [("softmax_logits", False)] * 2 + added


def test_a_lost_seed_counts_for_nobody_and_does_not_turn_the_order(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    records = [trial(tmp_path, gate, value) for gate, value in (("mean", 0.5), ("softmax", 0.9), ("gmu", 0.8))]
    seeds = {"mean": (0.5, 0.5, 0.5), "softmax": (0.8, 0.7, 0.6), "gmu": (0.6, 0.6, 0.9)}
    for gate, values in seeds.items():
        records += [trial(tmp_path, gate, value, seed=seed) for seed, value in enumerate(values, start=1)]
    whole = leaderboard(recipe, records)
    assert [one.name for one in whole.trials] == ["softmax", "gmu", "mean"] and whole.seeds == [1, 2, 3]
    records[5] = replace(records[5], status="failed", value=None, reason="out of memory")
    assert records[5].name == "mean-seed3"
    records[8] = replace(records[8], status="failed", value=None, reason="lost")
    assert records[8].name == "softmax-seed3"
    found = leaderboard(recipe, records)
    assert [one.name for one in found.trials] == ["softmax", "gmu", "mean"], "the one with more seeds is first"
    assert found.seeds == [1, 2] and found.trials[0].by_seed == [0.8, 0.7]
    assert found.trials[0].reason == "seed 3 failed: lost" and found.trials[1].reason == ""
    verdict = judged(tmp_path, records)
    assert abs(verdict.difference - 0.25) < 1e-6 and "2 seeds" in verdict.said and "chose" not in verdict.said


def test_a_finalist_that_lost_all_its_seeds_is_not_ranked_and_says_why(tmp_path: Path) -> None:
    records = [trial(tmp_path, gate, value) for gate, value in (("mean", 0.5), ("softmax", 0.9), ("gmu", 0.8))]
    records += [trial(tmp_path, gate, value, seed=n) for gate, value in (("mean", 0.5), ("gmu", 0.6)) for n in (1, 2)]
    dead = [trial(tmp_path, "softmax", 0.0, "failed", seed=seed, reason="it broke") for seed in (1, 2)]
    found = leaderboard(recipe_of(tmp_path), [*records, *dead])
    assert [one.name for one in found.trials] == ["gmu", "mean", "softmax"] and found.seeds == [1, 2]
    assert found.trials[2].by_seed == [] and found.trials[2].value == 0.9
    why = "not ranked among the finalists, seed 1 failed: it broke; seed 2 failed: it broke"
    assert found.trials[2].reason == why and why in found.table()


def test_the_seed_that_chose_the_finalists_counts_only_where_too_few_are_left(tmp_path: Path) -> None:
    records = [trial(tmp_path, "mean", 0.5), trial(tmp_path, "softmax", 0.9)]
    records += [trial(tmp_path, gate, 0.6, seed=1) for gate in ("mean", "softmax")]
    two = judged(tmp_path, records)
    assert abs(two.difference - 0.2) < 1e-6 and "seed 0, which chose the finalists, counts" in two.said
    records += [trial(tmp_path, "mean", 0.6, seed=2), trial(tmp_path, "softmax", 0.7, seed=2)]
    three = judged(tmp_path, records)
    assert abs(three.difference - 0.05) < 1e-6 and "2 seeds" in three.said and "chose" not in three.said


def test_what_the_finals_add_or_run_to_its_end_changes_nothing_after_a_restart(tmp_path: Path) -> None:
    """The averaging that was added does not count as drawn, and takes no finalist's place with its seeds."""
    keys = {"space": {GATE: ["softmax", "gmu", "sigmoid"], "optim.lr": [0.1, 0.2]}, "samples": 4, "searcher": "optuna"}
    recipe = recipe_of(tmp_path)
    recipe.search = SearchConfig(**keys, seeds=3, finalists=2)
    source = Proposed(recipe)
    for number in range(4):
        planned = source.draw()
        assert planned is not None
        write_record(planned[0], status="finished", value=0.5 + number / 100)
    first = _finals(recipe, source.records())
    added = [record.overrides[GATE] for record, _ in first if record.added]
    assert added == ["mean"] * 3 and len(first) == 9
    for record, _ in first[:-1]:  # killed before the last seed
        if read_record(record).status != "finished":
            write_record(record, status="finished", value=0.9 if averages(recipe, record) else 0.5)
    again = Proposed(recipe)
    assert again.left == 0 and len(again.records()) == 4
    assert [record.name for record, _ in _finals(recipe, again.records())] == [record.name for record, _ in first]

    averaging, _ = trial_of(recipe, {GATE: "mean", "optim.lr": 0.1})
    drawn = [*again.records(), replace(averaging, status="pruned", value=0.4, step=4)]
    before = [record.name for record, _ in _finals(recipe, drawn)]
    assert drawn[-1].name in before
    drawn[-1] = replace(drawn[-1], status="finished", value=0.9)
    assert [record.name for record, _ in _finals(recipe, drawn)] == before, "a finalist lost its place to averaging"
