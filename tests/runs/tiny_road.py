"""The smallest recipes over a few generated clips (the fixture `road`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from crossgate.config import ClipConfig, EncoderConfig, ModelConfig, Recipe
from crossgate.modality import MODALITIES
from crossgate.model.store import ModelCard, build_model, save_model
from crossgate.recipe import load_recipe
from crossgate.stream.index import Index, write_index


def tiny_tree(road: Path, output: Path, kind: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """The smallest recipe over the shards, with some sections' keys added."""
    tree: dict[str, Any] = {
        "kind": kind,
        "run": {"output": str(output)},
        "data": {"index": str(road / "shards"), "global_batch": 8, "clip": {"frames": 2, "size": 32, "mels": 32}},
        "model": {"dim": 16, "embedding": 8, "encoders": {name: {"backbone": "test_convnext"} for name in MODALITIES}},
        "training": {"steps": 4, "log_every": 1, "eval_every": 2, "save_every": 2},
        "evaluation": {"bootstrap": 50},
        "cluster": {"launcher": "local"},
    }
    for name, keys in sections.items():
        tree.setdefault(name, {}).update(keys)
    return tree


def write_recipe(path: Path, tree: dict[str, Any]) -> Recipe:
    """Writes the tree to a file and loads it as a user's recipe."""
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path)


def other_class_order(shards: Path, folder: Path) -> Path:
    """Copies shards under an index that numbers the classes of `violence` the other way round."""
    shutil.copytree(shards, folder)
    before = Index.load(str(folder))
    turned = {**before.vocabularies, "violence": before.vocabularies["violence"][::-1]}
    after = write_index(str(folder), before.names, vocabularies=turned)
    assert after.vocabularies["violence"] == ["nofight", "fight"]
    assert after.digest == before.digest, "the schedule is the same"
    return folder


def tiny_classifier(folder: Path, seconds: float, modalities: tuple[str, ...] = ("rgb", "flow")) -> Path:
    """Saves a violence model that has learnt nothing, for clips of so many seconds."""
    torch.manual_seed(0)
    card = ModelCard(
        kind="classifier",
        model=ModelConfig(dim=8, encoders={name: EncoderConfig(backbone="test_convnext") for name in modalities}),
        clip=ClipConfig(modalities=modalities, frames=2, size=32, seconds=seconds),
        task="violence",
        classes=("fight", "nofight"),
        positive="fight",
    )
    save_model(folder, build_model(card), card)
    return folder
