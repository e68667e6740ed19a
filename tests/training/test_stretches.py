"""Settings that change while training, and a training that pauses: no step is another one for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import run_fit, tiny_recipe

from crossgate.config import CHANGEABLE, Recipe
from crossgate.errors import UserError
from crossgate.recipe import as_of, dump_recipe, parse_recipe, recipe_digest, stretches
from crossgate.training.metrics import read_metrics

LATER = {"after": 7, "settings": {"optim.lr": 0.004, "optim.weight_decay": 0.5}}


def recipe_of(output: Path, name: str, *changes: dict[str, Any]) -> Recipe:
    return tiny_recipe(output, name, training={"schedule": changes})


def train(recipe: Recipe, until: int = 0) -> dict[str, torch.Tensor]:
    """Trains a whole recipe, or as far as a step; returns its last weights, if it came to the end."""
    for stretch in stretches(recipe, until):
        run_fit(stretch.settings, stretch=stretch, dropout=0.3, validated=False)
    kept = Path(recipe.run.output) / recipe.run.name / "model" / "w.pt"
    return torch.load(kept, weights_only=True) if kept.exists() else {}


def rates(output: Path, name: str) -> list[float]:
    return [line["train/lr"] for line in read_metrics(output / name) if "train/lr" in line]


def test_a_training_that_pauses_is_the_undisturbed_one(tmp_path: Path) -> None:
    whole = train(recipe_of(tmp_path, "whole", LATER))
    paused = recipe_of(tmp_path, "paused", LATER)
    assert train(paused, 4) == {} and train(paused, 7) == {} and train(paused, 8) == {}
    assert len(rates(tmp_path, "paused")) == 8
    again = train(paused)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert rates(tmp_path, "paused") == rates(tmp_path, "whole")


def test_changed_settings_hold_from_the_step_after(tmp_path: Path) -> None:
    plain, changed = train(recipe_of(tmp_path, "plain")), train(recipe_of(tmp_path, "changed", LATER))
    before, after = rates(tmp_path, "plain"), rates(tmp_path, "changed")
    assert after[:7] == before[:7] and after[7:] == pytest.approx([rate * 0.2 for rate in before[7:]])
    assert not torch.equal(plain["model.encoder.0.weight"], changed["model.encoder.0.weight"])


def test_a_change_after_a_checkpoint_may_still_be_made_and_no_other(tmp_path: Path) -> None:
    first = recipe_of(tmp_path, "run", LATER)
    train(first, 8)
    stored = tmp_path / "run" / "recipe.yaml"
    more = recipe_of(tmp_path, "run", LATER, {"after": 8, "settings": {"optim.lr": 0.01}})
    with pytest.raises(UserError, match="made with other settings"):
        train(more)
    stored.write_text(dump_recipe(more))  # as a population does
    assert train(more)
    stored.write_text(dump_recipe(recipe_of(tmp_path, "run", LATER | {"after": 6})))
    with pytest.raises(UserError, match="made with other settings"):
        train(recipe_of(tmp_path, "run", LATER | {"after": 6}))


def test_the_parts_of_a_schedule(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "run", LATER, {"after": 9, "settings": {"optim.lr": 0.1}})
    parts = stretches(recipe)
    assert [part.until for part in parts] == [7, 9, 0] and all(part.whole is recipe for part in parts)
    assert [part.settings.optim.lr for part in parts] == [0.02, 0.004, 0.1]
    assert [part.settings.optim.weight_decay for part in parts] == [0.05, 0.5, 0.5]
    assert [part.until for part in stretches(recipe, 7)] == [7] and [p.until for p in stretches(recipe, 8)] == [7, 8]
    assert [len(as_of(recipe, step).training.schedule) for step in (7, 8, 9, 10)] == [0, 1, 1, 2]
    plain = recipe_of(tmp_path, "run")
    assert stretches(plain) == [replace(parts[0], settings=plain, whole=plain, until=0)]
    assert recipe_digest(as_of(recipe, 7)) == recipe_digest(plain) != recipe_digest(recipe)


@pytest.mark.parametrize("key", CHANGEABLE)
def test_every_changeable_key_is_one_of_the_recipe(tmp_path: Path, key: str) -> None:
    changed = stretches(recipe_of(tmp_path, "run", {"after": 3, "settings": {key: 0.5}}))[1].settings
    section, _, last = key.rpartition(".")
    value: Any = changed
    for part in (*section.split("."), last):
        value = getattr(value, part)
    assert value == 0.5


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        ("finetune", [{"after": 3, "settings": {"model.dim": 8}}], "'model.dim' cannot change.*one of optim.lr"),
        ("finetune", [{"after": 3, "settings": {"optim.lr": -1.0}}], "training.schedule, after step 3.*optim.lr"),
        ("finetune", [LATER, LATER], "a later step than the one before"),
        ("finetune", [{"after": 12, "settings": {"optim.lr": 1.0}}], "training.steps ends there"),
        ("finetune", [{"after": 3, "settings": {}}], "settings"),
        ("pretrain", [LATER], "in fine-tuning only, not in kind pretrain"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(kind: str, changes: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_recipe({"kind": kind, "training": {"steps": 12, "schedule": changes}})
