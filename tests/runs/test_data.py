"""Runs over data that is not as the recipes assume: splits or classes that are missing, clips that are broken."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from tiny_road import tiny_tree, write_recipe
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.cluster.ray_train import launch
from crossgate.config import ClipConfig, EncoderConfig, ModelConfig, Recipe
from crossgate.errors import UserError
from crossgate.evaluation import read_results
from crossgate.model.store import ModelCard, read_card
from crossgate.recipe import load_recipe
from crossgate.runs.context import check_labels, run_directory
from crossgate.runs.evaluate import of_model
from crossgate.runs.finetune import selection_metric
from crossgate.runs.predictions import rounds
from crossgate.runs.summary import describe
from crossgate.stream.index import Index


def plain_tars(
    road: Path, folder: Path, splits: dict[str, int], labels: dict[str, list[str]], broken: int | None = None
) -> Path:
    """Writes ``KEY.mp4`` and ``KEY.json`` of generated clips as others would, one tar a split."""
    videos = sorted((road / "clips" / "videos").glob("*.mp4"))
    folder.mkdir()
    number = 0
    for split, count in splits.items():
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for _ in range(count):
                told = {task: names[number % len(names)] for task, names in labels.items()}
                text = {"split": split, "group": f"g{number}", "labels": told}
                video = b"no video" if number == broken else videos[number].read_bytes()
                for suffix, data in (("mp4", video), ("json", json.dumps(text).encode())):
                    info = tarfile.TarInfo(f"clip{number:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return folder


def foreign_tree(folder: Path, output: Path, kind: str, **sections) -> dict:
    tree = tiny_tree(folder, output, kind, **sections)
    tree["data"] |= {"index": str(folder), "global_batch": 4}
    tree["data"]["clip"]["modalities"] = ["rgb", "flow", "audio"]
    tree["training"] = {"steps": 2, "log_every": 1}
    return tree


def ended(recipe: Recipe) -> str:
    return describe(recipe, launch(recipe))


def test_tars_of_others_are_pretrained_without_validation_and_test(road: Path, tmp_path: Path) -> None:
    folder = plain_tars(road, tmp_path / "tars", {"train": 4}, {})
    tree = foreign_tree(folder, tmp_path, "pretrain")
    with pytest.raises(UserError, match=r"data.val: split 'val' does not exist.*data.val=\[\]"):
        launch(write_recipe(tmp_path / "without.yaml", tree))
    write_recipe(tmp_path / "plain.yaml", tree)
    recipe = load_recipe(tmp_path / "plain.yaml", ["data.val=[]", "data.test=[]"])
    text = ended(recipe)
    directory = run_directory(recipe)
    assert str(directory / "report.html") in text
    assert (directory / "model" / "model.safetensors").exists()
    page = (directory / "report.html").read_text()
    assert "no test split" in page
    assert "<h2>Training</h2>" in page
    assert "<h2>Retrieval" not in page


def test_a_missing_split_stops_a_run_before_it_trains(road: Path, tmp_path: Path) -> None:
    for key, kind in (("test", "pretrain"), ("val", "finetune"), ("train", "finetune")):
        recipe = write_recipe(tmp_path / f"{key}.yaml", tiny_tree(road, tmp_path, kind, data={key: ["nosuch"]}))
        with pytest.raises(UserError, match=f"data.{key}: split 'nosuch' does not exist"):
            launch(recipe)
        assert not run_directory(recipe).exists()
    recipe = write_recipe(tmp_path / "no-val.yaml", tiny_tree(road, tmp_path, "finetune", data={"val": []}))
    with pytest.raises(UserError, match="data.val: this run needs such a split"):
        launch(recipe)


def test_two_classes_of_other_names_and_a_broken_test_clip(road: Path, tmp_path: Path) -> None:
    labels = {"weather": ["calm", "storm"]}
    folder = plain_tars(road, tmp_path / "tars", {"train": 4, "val": 4, "test": 4}, labels, broken=9)
    recipe = write_recipe(
        tmp_path / "weather.yaml", foreign_tree(folder, tmp_path, "finetune", finetune={"task": "weather"})
    )
    text = ended(recipe)
    directory = run_directory(recipe)
    metrics, _ = read_results(directory / "results.json")
    assert "test/average_precision" not in metrics
    assert (metrics["val/bad_clips"], metrics["test/bad_clips"], metrics["test/clips"]) == (0, 1, 3)
    assert "Left out, since they cannot be decoded: clips, 1 of test" in (directory / "report.html").read_text()
    assert read_card(directory / "model").positive == ""
    assert "accuracy on test" in text
    assert f"next: crossgate release {directory}" in text
    evaluate = foreign_tree(folder, tmp_path, "evaluate", evaluation={"model": str(directory)})
    evaluate["data"]["train"] = ["elsewhere"]  # a classifier is measured without its training clips
    again = write_recipe(tmp_path / "again.yaml", evaluate)
    launch(again)
    assert read_results(run_directory(again) / "results.json")[0]["test/accuracy"] == metrics["test/accuracy"]


def test_two_classes_are_selected_by_average_precision_only_with_a_positive_one() -> None:
    assert selection_metric(["fight", "nofight"], "fight") == "val/average_precision"
    assert selection_metric(["calm", "storm"], "fight") == "val/accuracy"
    assert selection_metric(["fight", "hug", "run"], "fight") == "val/accuracy"


def test_the_last_line_of_pretraining_is_a_command_that_works(road: Path, tmp_path: Path) -> None:
    tree = tiny_tree(road, tmp_path / "runs", "pretrain")
    write_recipe(tmp_path / "pre.yaml", tree)
    shown = CliRunner().invoke(app, ["pretrain", "-c", str(tmp_path / "pre.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "linear probe names the action" in shown.output
    command = shown.output.strip().splitlines()[-1]
    assert command.startswith("next: crossgate finetune --config ")
    shown = CliRunner().invoke(app, command.split()[2:])
    assert shown.exit_code == 0, shown.output
    assert "(chance " in shown.output, "a headline number stands beside what knowing nothing gives"
    video = str(min((road / "clips" / "videos").glob("*.mp4")))
    predict = next(line for line in shown.output.splitlines() if "crossgate predict" in line)
    words = predict.replace("VIDEO", video).split()[2:]
    shown = CliRunner().invoke(app, [*words, "nowhere.mp4", "--json"])
    assert shown.exit_code == 1, "a script must hear of the clip that failed"
    good, failed = (json.loads(line, parse_constant=pytest.fail) for line in shown.stdout.strip().splitlines()[-2:])
    assert good["score"] > 0
    assert failed["score"] is None


@pytest.mark.parametrize(
    ("clips", "ranks", "limit", "batches"),
    [(64, 1, None, 1), (65, 1, None, 2), (130, 2, None, 2), (128, 2, None, 1), (1, 4, None, 1), (900, 2, 100, 1)],
)
def test_every_rank_predicts_as_often_as_the_one_with_most(
    clips: int, ranks: int, limit: int | None, batches: int
) -> None:
    assert rounds(clips, ranks, limit) == batches


def test_a_model_that_exists_is_rebuilt_without_downloads(tmp_path: Path) -> None:
    network = ModelConfig(encoders={"rgb": EncoderConfig(pretrained=True)})
    card = ModelCard(kind="contrastive", model=network, clip=ClipConfig())
    rebuilt = of_model(Recipe(kind="evaluate"), card).model
    assert not rebuilt.encoder("rgb").pretrained
    assert rebuilt.encoder("rgb").backbone == network.encoder("rgb").backbone


def test_a_split_that_is_trained_on_cannot_be_tested_on(road: Path, tmp_path: Path) -> None:
    tree = tiny_tree(road, tmp_path, "finetune", finetune={"task": "violence"})
    tree["data"]["val"] = ["test"]
    with pytest.raises(UserError, match=r"data\.test.*'test' is in data\.val as well"):
        launch(write_recipe(tmp_path / "x.yaml", tree))


def test_labels_are_missed_before_training_and_not_after(road: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = write_recipe(tmp_path / "x.yaml", tiny_tree(road, tmp_path, "finetune", finetune={"task": "violence"}))
    index = Index.load(recipe.data.index)
    monkeypatch.setattr(Index, "class_counts", lambda self, splits: {"violence": [0, 0]})
    with pytest.raises(UserError, match=r"data\.val.*no clip of val has a label 'violence'"):
        check_labels(index, recipe, "val", "test")
    monkeypatch.setattr(Index, "class_counts", lambda self, splits: {"violence": [0, 7]})
    with pytest.raises(UserError, match=r"data\.test.*one class only: 'nofight'"):
        check_labels(index, recipe, "test")
    recipe.finetune.positive = "riot"  # no such class: plain accuracy counts, and one class will do
    check_labels(index, recipe, "test")
