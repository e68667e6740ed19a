"""What every trial would stumble over is said before the first one starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_road import tiny_tree, write_recipe

from crossgate.cluster.ray_tune import search
from crossgate.config import Recipe
from crossgate.errors import UserError

GATES = {"model.fusion.name": ["mean", "softmax"]}


def search_of(road: Path, tmp_path: Path, search: dict[str, Any], **changes: Any) -> Recipe:
    tree = tiny_tree(road, tmp_path, "search", search={"space": GATES, "metric": "val/accuracy"} | search, **changes)
    return write_recipe(tmp_path / "search.yaml", tree)


@pytest.mark.parametrize(
    ("found", "changes", "says"),
    [
        (
            {"metric": "val/acuracy"},
            {},
            r"search\.metric: trials do not measure .*did you mean 'val/accuracy'.*val/nll",
        ),
        (
            {"space": {"model.fusion.name": ["mean", "sofmax"]}},
            {},
            r"search\.space\.model\.fusion\.name: unknown fusion",
        ),
        (
            {"space": {"optim.lr": [0.1]}},
            {"model": {"fusion": {"name": "sofmax"}}},
            r"^model\.fusion\.name: unknown fusion",
        ),
        ({}, {"finetune": {"task": "acton"}}, r"finetune\.task: the index has no labels 'acton'; expected action"),
        ({}, {"finetune": {"task": "action", "init": "runs/PRETRAIN_RUN"}}, "PRETRAIN_RUN: no model here"),
    ],
)
def test_it_is_said_before_ray_starts(road, tmp_path, monkeypatch, found, changes, says: str) -> None:
    monkeypatch.setattr("crossgate.cluster.ray_tune._Stage", lambda *args: pytest.fail("trials would have begun"))
    recipe = search_of(road, tmp_path, found, **changes)
    with pytest.raises(UserError, match=says):
        search(recipe)
    assert not (Path(recipe.run.output) / recipe.run.name).exists()


def test_what_the_space_varies_is_left_to_its_trials(road, tmp_path, monkeypatch) -> None:
    class Begun(Exception):
        pass

    def begin(*args: object) -> None:
        raise Begun

    monkeypatch.setattr("crossgate.cluster.ray_tune._Stage", begin)
    space = {"space": GATES | {"finetune.task": ["action", "acton"]}}
    with pytest.raises(Begun):
        search(search_of(road, tmp_path, space, finetune={"task": "nobody knows"}))
