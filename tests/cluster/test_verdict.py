"""Who has won: which seeds count, what becomes of a lost one, and what the sentence says beside p."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny_run import tiny_recipe

from crossgate.cluster.leaderboard import GATE, verdict_on
from crossgate.cluster.trials import TrialRecord, leaderboard
from crossgate.config import Recipe
from crossgate.evaluation.selection import Answers, Verdict


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
        keys = np.array([f"clip{i:03d}" for i in range(count)])
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
    assert "best of 1 that finished; 3 trials pruned early not counted" in found.said
