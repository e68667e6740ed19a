"""A small study from shards to tables: one command, features kept, the test clips scored by what validation chose."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from tiny_road import tiny_tree, write_recipe
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.cluster.ray_train import launch
from crossgate.config import ExchangeConfig
from crossgate.errors import UserError
from crossgate.evaluation import read_results
from crossgate.model.classifier import Classifier
from crossgate.model.contrastive import ContrastiveModel
from crossgate.model.network import MultimodalNetwork
from crossgate.model.store import ModelCard, load_model, save_model
from crossgate.runs.context import run_directory
from crossgate.runs.study import few
from crossgate.runs.summary import describe

GATES = ["mean", "softmax_probabilities"]


def test_a_study_compares_gates_on_kept_features(road: Path, tmp_path: Path) -> None:
    kept_at = str(tmp_path / "kept")
    tree = tiny_tree(
        road, tmp_path, "study",
        finetune={"task": "action", "init": str(tmp_path / "start"), "freeze": True, "features": kept_at},
        study={"gates": GATES, "seeds": 2, "folds": 2, "steps": 6, "eval_every": 3, "noise": [1.0], "labels": [0.5]},
    )  # fmt: skip
    recipe = write_recipe(tmp_path / "study.yaml", tree)
    torch.manual_seed(recipe.run.seed + 1)  # or these encoders may be the very ones that the study draws at random
    network = MultimodalNetwork(recipe.model, recipe.data.clip)
    card = ModelCard(kind="contrastive", model=recipe.model, clip=recipe.data.clip)
    save_model(tmp_path / "start", ContrastiveModel(network), card)
    metrics = launch(recipe)

    folder = run_directory(recipe)
    assert (folder / "report.html").exists() and (folder / "figures" / "noise.png").exists()
    text = (folder / "study.md").read_text()
    for name in (*GATES, "uniform mean", "rgb alone", "oracle", "shuffled gate", "frozen random gate", "mask only",
                 "truth of degradation", "| rgb + flow + audio + depth |", "| depth | holes | 1.00 |",
                 "| audio | clipped | 1.00 |"):  # fmt: skip
        assert name in text, name
    stored, _ = read_results(folder / "results.json")
    assert stored["test/study/uniform_mean/accuracy"] == metrics["test/study/uniform_mean/accuracy"]
    assert stored["test/study/over_uniform"] in [stored[f"test/study/{gate}/over_uniform"] for gate in GATES]
    model, kept_card = load_model(folder)
    assert isinstance(model, Classifier)
    chosen = kept_card.model.fusion.name
    assert chosen in GATES
    assert kept_card.classes == model.classes and kept_card.task == "action" and model.network.standardised
    own = model.network.encoders.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in network.encoders.state_dict().items())
    told = describe(recipe, metrics)
    assert f"({chosen})" in told and "(uniform_mean)" in told
    command = told.partition("next: crossgate ")[2].replace("run.name=", f"run.output={tmp_path} run.name=")
    further = CliRunner().invoke(app, [*shlex.split(command), "training.steps=1"])
    assert further.exit_code == 0, further.output
    kept = list((tmp_path / "kept").glob("*.safetensors"))
    assert len(kept) == 6, "three parts, of these encoders and of random ones"


def test_a_study_of_encoders_that_learned_of_one_another_goes_on_without(road, tmp_path, caplog) -> None:
    kept = {"task": "action", "init": str(tmp_path / "start"), "freeze": True, "features": str(tmp_path / "kept")}
    sizes = {"gates": GATES, "seeds": 1, "folds": 2, "steps": 2, "eval_every": 2, "noise": [], "labels": []}
    recipe = write_recipe(tmp_path / "study.yaml", tiny_tree(road, tmp_path, "study", finetune=kept, study=sizes))
    config = recipe.model.model_copy(update={"exchange": ExchangeConfig(name="mmtm")})
    network = MultimodalNetwork(config, recipe.data.clip, classes=2)
    card = ModelCard(kind="classifier", model=config, clip=recipe.data.clip, task="violence", classes=("fight", "no"))
    save_model(tmp_path / "start", Classifier(network, card.classes), card)
    with caplog.at_level("INFO", logger="crossgate.runs"):
        assert 0 <= launch(recipe)["test/study/uniform_mean/accuracy"] <= 1
    assert "not loaded: exchange: it is another" in caplog.text
    model, _ = load_model(run_directory(recipe))
    assert model.network.config.exchange.name == "none"


def test_a_study_on_several_ranks_is_refused(road: Path, tmp_path: Path) -> None:
    tree = tiny_tree(road, tmp_path, "study", cluster={"workers": 2, "launcher": "local"})
    with pytest.raises(UserError, match="one process"):
        launch(write_recipe(tmp_path / "study.yaml", tree))


def test_a_misspelt_gate_is_refused_before_a_clip_is_encoded(road: Path, tmp_path: Path, caplog) -> None:
    kept = {"task": "action", "freeze": True, "features": str(tmp_path / "kept")}
    tree = tiny_tree(road, tmp_path, "study", finetune=kept, study={"gates": ["softmaxx"]})
    with pytest.raises(UserError, match=r"study\.gates: unknown fusion 'softmaxx'.*did you mean 'softmax'"):
        launch(write_recipe(tmp_path / "study.yaml", tree))
    assert not (tmp_path / "kept").exists()
    assert "finetune.init is empty, so the encoders are random ones" in caplog.text


def test_a_study_of_averages_alone_is_refused(road: Path, tmp_path: Path) -> None:
    tree = tiny_tree(road, tmp_path, "study", study={"gates": ["average_logits", "fixed_probabilities"]})
    with pytest.raises(UserError, match=r"study\.gates: only averages are named"):
        launch(write_recipe(tmp_path / "study.yaml", tree))


def test_few_labels_cover_every_class_and_are_a_draw_a_seed() -> None:
    labels = torch.arange(100) % 5
    rows = few(labels, 0.01, 5, seed=0)
    assert sorted(labels[rows].tolist()) == [0, 1, 2, 3, 4]
    assert torch.bincount(labels[few(labels, 0.2, 5, seed=0)]).tolist() == [4] * 5
    assert not torch.equal(rows, few(labels, 0.01, 5, seed=1))
    assert len(few(labels, 1.0, 5, seed=0)) == 100
