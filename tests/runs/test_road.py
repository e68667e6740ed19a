"""The main road in small: shards -> pretraining -> fine-tuning -> evaluation -> release -> prediction."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tiny_road import other_class_order, tiny_tree, write_recipe
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.cluster.ray_train import launch
from crossgate.config import DataConfig
from crossgate.errors import UserError
from crossgate.evaluation import read_results
from crossgate.model.store import read_card
from crossgate.recipe import dump_recipe, load_recipe
from crossgate.registry.predictor import Predictor
from crossgate.runs.context import run_directory
from crossgate.runs.predict import format_rows, predict_videos
from crossgate.runs.release import release_run
from crossgate.stream.index import Index
from crossgate.stream.loader import sequential


@pytest.fixture(scope="module")
def pretrained(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    recipe = write_recipe(folder / "tiny.yaml", tiny_tree(road, folder / "runs", "pretrain"))
    launch(recipe)
    return run_directory(recipe)


@pytest.fixture(scope="module")
def finetuned(road: Path, pretrained: Path) -> Path:
    sections = {"finetune": {"task": "violence", "init": str(pretrained)}, "model": {"fusion": {"name": "softmax"}}}
    recipe = write_recipe(
        pretrained.parent / "violence.yaml", tiny_tree(road, pretrained.parent, "finetune", **sections)
    )
    launch(recipe)
    return run_directory(recipe)


def test_pretraining_leaves_what_a_user_looks_for(pretrained: Path) -> None:
    for name in ("report.html", "results.json", "metrics.jsonl", "recipe.yaml", "model/model.safetensors"):
        assert (pretrained / name).exists(), name
    metrics, provenance = read_results(pretrained / "results.json")
    assert "test/linear_probe/action/fused/accuracy" in metrics
    assert "test/retrieval/mean/r_at_1" in metrics
    assert provenance["index_digest"]
    assert "http" not in (pretrained / "report.html").read_text().split("</style>")[1].replace("http://www.w3.org", "")


def test_a_finished_run_started_again_says_so_and_repeats_nothing(pretrained: Path) -> None:
    before = (pretrained / "metrics.jsonl").read_text()
    launch(load_recipe(pretrained.parent.parent / "tiny.yaml"))
    assert (pretrained / "metrics.jsonl").read_text() == before


def test_mlflow_holds_the_run_once(pretrained: Path, finetuned: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{pretrained.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("crossgate")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == {pretrained.name, finetuned.name}
    assert all(run.info.status == "FINISHED" for run in runs)
    run = next(run for run in runs if run.info.run_name == finetuned.name)
    assert run.data.params["finetune.task"] == "violence"
    assert run.data.metrics["test/average_precision"] == pytest.approx(
        read_results(finetuned / "results.json")[0]["test/average_precision"]
    )
    assert {"report.html", "recipe.yaml"} <= {item.path for item in client.list_artifacts(run.info.run_id)}


def test_evaluation_of_a_run_repeats_its_numbers(road: Path, finetuned: Path, tmp_path: Path) -> None:
    sections = {"evaluation": {"model": str(finetuned), "bootstrap": 50}}
    recipe = write_recipe(tmp_path / "again.yaml", tiny_tree(road, tmp_path, "evaluate", **sections))
    for _ in range(2):  # the second time in the first one's folder
        launch(recipe)
        again, _ = read_results(run_directory(recipe) / "results.json")
        first, _ = read_results(finetuned / "results.json")
        assert again["test/average_precision"] == pytest.approx(first["test/average_precision"], abs=1e-6)


def test_an_evaluation_leaves_another_runs_folder_alone(road: Path, finetuned: Path, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in finetuned.iterdir() if path.is_file()}

    before = content()
    run = {"output": str(finetuned.parent), "name": finetuned.name}
    tree = tiny_tree(road, tmp_path, "evaluate", evaluation={"model": str(finetuned)}, run=run)
    with pytest.raises(UserError, match=r"made with other settings.*another run\.name"):
        launch(write_recipe(tmp_path / "over.yaml", tree))
    assert content() == before


def test_evaluation_of_a_pretrained_model(road: Path, pretrained: Path, tmp_path: Path) -> None:
    sections = {"evaluation": {"model": str(pretrained), "bootstrap": 50}}
    recipe = write_recipe(tmp_path / "pre.yaml", tiny_tree(road, tmp_path, "evaluate", **sections))
    launch(recipe)
    again, _ = read_results(run_directory(recipe) / "results.json")
    first, _ = read_results(pretrained / "results.json")
    assert "test/linear_probe_random/action/fused/accuracy" in first
    for name in ("test/retrieval/mean/r_at_1", "test/linear_probe_random/action/fused/accuracy"):
        assert again[name] == pytest.approx(first[name], abs=1e-6)
    assert load_recipe(run_directory(recipe) / "recipe.yaml").evaluation.model == str(pretrained)


def test_released_model_predicts_through_the_registry(road: Path, finetuned: Path) -> None:
    released = release_run(finetuned)
    assert released.uri == "models:/crossgate-violence@champion"
    assert released.decision is not None
    assert "WARNING: not shown to beat chance" in released.decision.text()  # four steps of training
    videos = sorted(str(path) for path in (road / "clips" / "videos").glob("*.mp4"))[:2]
    before = list(sys.path)
    frame = predict_videos(released.uri, [*videos, "nowhere.mp4"], tracking_uri=released.tracking_uri)
    assert sys.path == before  # the packaged copy of crossgate must not shadow this one in later processes
    good, bad = frame.iloc[:2], frame.iloc[2]
    assert set(good["label"]) <= {"fight", "nofight"}
    for row in good.to_dict(orient="records"):
        assert math.isclose(sum(row["scores"].values()), 1, abs_tol=1e-5)
        assert math.isclose(sum(row["weights"].values()), 1, abs_tol=1e-5)
        assert set(row["modalities"]) <= {"rgb", "flow", "audio"}  # no depth was given
    assert "nowhere.mp4" in str(bad["error"])
    assert "nowhere.mp4" in format_rows(frame)


def test_what_answers_is_what_was_measured(road: Path, finetuned: Path, tmp_path: Path) -> None:
    """The report's accuracy is that of the labels which the model gives, for it keeps the report's threshold."""
    metrics, _ = read_results(finetuned / "results.json")
    card = read_card(finetuned / "model")
    assert card.threshold == metrics["val/threshold"] != 0.5
    index = Index.load(str(road / "shards"))
    predictor, recipe, right = Predictor(finetuned), load_recipe(finetuned / "recipe.yaml"), []
    for batch in sequential(index, recipe.data.test, recipe.data, batch_size=1):
        truth = int(batch.labels["violence"][0])
        if truth >= 0:
            clip = {m: batch.streams[m][0] for i, m in enumerate(batch.modalities) if batch.present[0, i]}
            right.append(predictor.score(clip)["label"] == card.classes[truth])
    assert len(right) == metrics["test/clips"]
    assert sum(right) / len(right) == pytest.approx(metrics["test/accuracy"])


def test_the_registered_model_agrees_with_the_directory(road: Path, finetuned: Path) -> None:
    video = str(min((road / "clips" / "videos").glob("*.mp4")))
    released = release_run(finetuned)
    registered = predict_videos(released.uri, [video], tracking_uri=released.tracking_uri)
    direct = predict_videos(str(finetuned), [video])
    assert registered["scores"][0] == pytest.approx(direct["scores"][0], abs=1e-6)


def test_depth_files_and_units_pair_with_videos(finetuned: Path) -> None:
    for keys, complaint in (
        ({"depth": ["a"]}, "1 depth files for 2 videos"),
        ({"units": ["mm"]}, "1 depth units for 2"),
    ):
        with pytest.raises(UserError, match=f"{complaint}.*one each"):
            predict_videos(str(finetuned), ["a.mp4", "b.mp4"], **keys)
    assert len(predict_videos(str(finetuned), [], units=[])) == 0


def test_classes_of_another_index_are_refused(road: Path, finetuned: Path, tmp_path: Path) -> None:
    card = json.loads((finetuned / "model" / "model.json").read_text())
    assert card["classes"] == ["fight", "nofight"]
    other = tmp_path / "model"
    shutil.copytree(finetuned / "model", other)
    card["classes"] = ["calm", "storm"]
    (other / "model.json").write_text(json.dumps(card))
    sections = {"evaluation": {"model": str(other)}}
    with pytest.raises(UserError, match="violence"):
        launch(write_recipe(tmp_path / "other.yaml", tiny_tree(road, tmp_path, "evaluate", **sections)))


def test_a_run_does_not_go_on_where_classes_have_other_numbers(road: Path, finetuned: Path, tmp_path: Path) -> None:
    """The shards' digest is the same, so that the loader would go on; but the head means other classes."""
    shutil.copytree(finetuned, tmp_path / "moved" / finetuned.name)
    tree = yaml.safe_load((finetuned / "recipe.yaml").read_text())
    tree["run"]["output"], tree["data"]["index"] = str(tmp_path / "moved"), str(tmp_path / "turned")
    other_class_order(road / "shards", tmp_path / "turned")
    with pytest.raises(
        UserError, match=r"turned: class 0 of the checkpoint \S+ is 'fight', of the index 'nofight'; exp"
    ):
        launch(write_recipe(tmp_path / "turned.yaml", tree))
    tree["data"]["index"] = str(road / "shards")
    launch(write_recipe(tmp_path / "same.yaml", tree))


def test_a_run_refused_after_it_was_opened_leaves_no_folder(road: Path, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text("[]")
    sections = {
        "run": {"name": "refused"},
        "engine": {"deepspeed": str(tmp_path / "zero.json")},
        "tracking": {"enabled": False},
    }
    with pytest.raises(UserError, match="zero.json"):
        launch(write_recipe(tmp_path / "x.yaml", tiny_tree(road, tmp_path / "runs", "pretrain", **sections)))
    assert not (tmp_path / "runs" / "refused").exists()


def test_another_recipe_under_the_same_name_is_refused(road: Path, pretrained: Path) -> None:
    sections = {"run": {"name": pretrained.name}, "optim": {"lr": 0.5}}
    recipe = write_recipe(pretrained.parent / "x.yaml", tiny_tree(road, pretrained.parent, "pretrain", **sections))
    with pytest.raises(UserError, match="run.name"):
        launch(recipe)


def test_a_weaker_challenger_is_refused_on_the_frozen_set(finetuned: Path, tmp_path: Path) -> None:
    """The real gate between two models over the same test clips; the same weights with other noise on top."""
    import torch

    from crossgate.model.store import load_model, save_model
    from crossgate.runs.release import decide_on_run

    first = release_run(finetuned)
    other = finetuned.parent / "weaker"
    shutil.copytree(finetuned, other)
    model, card = load_model(other)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    shutil.rmtree(other / "model")
    save_model(other / "model", model, card)
    # A dozen clips prove nothing: the gate refuses what it cannot tell, and names the numbers.
    decision = decide_on_run(other, settings=("release.slice_clips=2",))
    assert not decision.passed
    assert decision.champion == first.version
    said = "\n".join(decision.reasons)
    for part in ("average precision", "clips of", "class fight", "forward pass", "at most 1.5"):
        assert part in said
    assert not (other / "gate").exists()
    # Other clips than those of the first release are refused, unless they are meant.
    recipe = load_recipe(other / "recipe.yaml")
    (other / "recipe.yaml").write_text(dump_recipe(recipe.model_copy(update={"data": _swapped(recipe.data)})))
    with pytest.raises(UserError, match="models:/crossgate-violence: would be judged on another evaluation set"):
        decide_on_run(other)
    done = CliRunner().invoke(app, ["release", str(other), "--dry-run", "--new-evaluation-set"])
    assert done.exit_code == 1 and "a new evaluation set from now on" in done.output, done.output
    shutil.rmtree(other)


def _swapped(data: DataConfig) -> DataConfig:
    return data.model_copy(update={"val": data.test, "test": data.val})
