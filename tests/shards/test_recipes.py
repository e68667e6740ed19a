"""The recipes of public data sets: each is one that the configuration takes, and fits what its adapter packs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import layouts
import pytest
from manifest_of import listing

from crossgate.evaluation.classifier_sections import NAMES
from crossgate.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes" / "public").glob("*.yaml"))
README = (ROOT / "shards" / "README.md").read_text()
BUILT = {"kinetics_sounds": "kinetics", "ntu_rgbd": "ntu", "utd_mhad": "utd"}


def head(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


def script_of(path: Path) -> str:
    found = re.search(rf"^# run: +python shards/(\w+)\.py /data/\S+ {path.stem}\.csv ", head(path), re.MULTILINE)
    assert found, "the header says no command"
    return found[1]


def test_every_adapter_has_its_recipe_and_its_row() -> None:
    adapters = {p.stem for p in (ROOT / "shards").glob("*.py") if "run(main)" in p.read_text()}
    assert {script_of(path) for path in RECIPES} == adapters
    assert len(adapters) == len(RECIPES) == 11
    for path in RECIPES:
        row = rf"^\| [^|]*`{script_of(path)}\.py`, \[{path.stem}\]\(\.\./jobs/recipes/public/{path.name}\) \|"
        assert re.search(row, README, re.MULTILINE), path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_fits_the_adapter(path: Path, tmp_path: Path, tiny: bytes) -> None:
    recipe, name = load_recipe(path), script_of(path)
    adapter = importlib.import_module(name)
    getattr(layouts, BUILT.get(name, name))(tmp_path, tiny)
    found = listing(adapter.videos(tmp_path)).videos
    task = recipe.finetune.task
    classes = {video.labels[task] for video in found if task in video.labels}
    assert classes, f"the adapter gives no label of {task}"
    if task == "violence":
        assert recipe.finetune.positive in classes
    assert recipe.kind == "finetune"
    assert recipe.data.clip.seconds == adapter.SETTINGS.seconds
    assert recipe.evaluation.unit == "video"
    assert set(recipe.model.encoders) == set(recipe.data.clip.modalities)
    whole = listing(adapter.videos(tmp_path))
    assert bool(whole.shared) == ("--as-published" in head(path).partition("# protocol")[0]), (
        "published with both sides"
    )
    assert ("depth" in recipe.data.clip.modalities) == ("--depth" in head(path))


@pytest.mark.parametrize("stem", ["rwf2000", "hockey", "surveillance"])
def test_the_accuracy_to_compare_with_a_published_one_is_named(stem: str) -> None:
    """`test/accuracy` of two classes is at a threshold that validation chose; the published ones take the likelier."""
    protocol = head(ROOT / "jobs" / "recipes" / "public" / f"{stem}.yaml").partition("protocol:")[2]
    assert "accuracy of the likelier class (test/accuracy_argmax;" in protocol
    assert "accuracy_argmax" in NAMES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_header_says_command_protocol_and_published_number(path: Path) -> None:
    text = " ".join(head(path).replace("#", " ").split())
    index = f"shards-{path.stem}"
    assert f"--pack {index} " in text
    assert f"crossgate finetune --config jobs/recipes/public/{path.name} data.index={index} protocol: " in text
    published = text.partition("published: ")[2]
    assert "no number quoted" in published or re.search(r"\d %.*\(.+\)|\d % by", published)
    quoted = re.search(r"\| ([^|]+) \|$", next(r for r in README.splitlines() if f"[{path.stem}]" in r))
    assert quoted
    for number in re.findall(r"\d+\.\d+", quoted[1]):
        assert number in published, f"the table quotes {number}, the recipe does not"
