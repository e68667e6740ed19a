"""The life of a name in a real MLflow: first champion, refused challenger, promoted one, back again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from safetensors.torch import load_file

from crossgate.config import Recipe, ReleaseConfig, TrackingConfig
from crossgate.errors import UserError
from crossgate.evaluation.predictions import Predictions
from crossgate.model.store import build_model, read_card, save_model
from crossgate.recipe import dump_recipe
from crossgate.registry.aliases import Decision, rollback
from crossgate.registry.card import description, model_card
from crossgate.registry.frozen import TAG
from crossgate.registry.release import decide, fetched, load, pinned_version, release
from crossgate.runs.release import decide_on_run, release_run

NAME = "crossgate-violence"
NO = Decision(False, ("REFUSED accuracy 0.1",))
YES = Decision(True, ("ok      accuracy 0.9",))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Callable[[int], Path]:
    """Finished runs of different weights, below one output folder."""
    output = tmp_path_factory.mktemp("runs")

    def make(seed: int) -> Path:
        folder = output / f"run-{seed}"
        if not folder.exists():
            torch.manual_seed(seed)
            card = read_card(model_dir)
            save_model(folder / "model", build_model(card), card)
            results = {"format": 1, "metrics": {"test/clips": 40.0, "test/groups": 9.0}, "provenance": {}}
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


def test_a_name_lives_through_champions(run: Callable[[int], Path], videos: Path) -> None:
    config, tracking = ReleaseConfig(), TrackingConfig()
    asked: list[Path] = []

    def says(decision: Decision) -> Callable[[Path | None], Decision]:
        def judge(champion: Path | None) -> Decision:
            if champion is None:
                return Decision(True, ("first version",))
            asked.append(champion)
            weights = load_file(champion / "model.safetensors")
            assert weights.keys() == load_file(run(1) / "model" / "model.safetensors").keys()
            return decision

        return judge

    # The first version of a name becomes champion: there is nothing to compare it with.
    assert "first version" in decide(run(1), config, tracking, says(NO)).reasons[0]
    first = release(run(1), config, tracking, says(NO))
    assert (first.version, first.alias) == (1, "champion")
    assert "first version" in version(first.tracking_uri, 1).tags["crossgate.decision"]
    assert asked == []

    # A dry run says what would happen and leaves nothing behind.
    dry = decide(run(2), config, tracking, says(NO))
    assert (dry.passed, dry.champion) == (False, 1)
    uri = TrackingConfig(uri=first.tracking_uri)
    with pytest.raises(UserError, match="regist"):
        load(f"models:/{NAME}/2", uri)

    # A refused one is challenger, keeps the reason, and the champion stays.
    refused = release(run(2), config, tracking, says(NO))
    assert (refused.version, refused.alias, refused.uri) == (2, "challenger", f"models:/{NAME}@challenger")
    assert champion(first.tracking_uri) == 1
    tags = version(first.tracking_uri, 2).tags
    assert "REFUSED accuracy 0.1" in tags["crossgate.decision"]

    # Released anew, the same weights are judged anew and make no second version.
    passed = release(run(2), config, tracking, says(YES))
    assert (passed.version, passed.alias, passed.fresh) == (2, "champion", False)
    assert champion(first.tracking_uri) == 2
    assert not any(folder.exists() for folder in asked), "the champion's copies are gone"

    # The champion itself needs no gate.
    count = len(asked)
    again = release(run(2), config, tracking, says(NO))
    assert again.decision is not None
    assert again.decision.passed
    assert len(asked) == count

    # Back by alias, and forth by number.
    assert rollback(NAME, uri) == (2, 1)
    assert load(f"models:/{NAME}@champion", uri).predict([str(videos / "mute.mp4")])["error"][0] is None
    assert champion(first.tracking_uri) == 1
    with pytest.raises(UserError, match="before"):
        rollback(NAME, uri)
    assert rollback(NAME, uri, to=2) == (1, 2)
    with pytest.raises(UserError, match="no version 9"):
        rollback(NAME, uri, to=9)
    with pytest.raises(UserError, match="no version is 'champion'"):
        rollback("nobody", uri)


def test_all_releases_of_a_name_are_judged_on_one_evaluation_set(run: Callable[[int], Path]) -> None:
    config, tracking = ReleaseConfig(name="frozen"), TrackingConfig()
    asked: list[Path | None] = []

    def judge(champion: Path | None) -> Decision:
        asked.append(champion)
        return YES

    def away() -> str:
        raise UserError("does not answer", where="s3://clips")

    def pinned() -> str | None:
        return MlflowClient(first.tracking_uri, first.tracking_uri).get_registered_model("frozen").tags.get(TAG)

    first = release(run(1), config, tracking, judge, away)  # which nobody judges
    assert pinned() is None
    assert decide(run(2), config, tracking, judge, lambda: "9 clips of aaa").reasons == YES.reasons
    assert pinned() is None, "a dry run pins nothing"
    release(run(2), config, tracking, judge, lambda: "9 clips of aaa")
    assert pinned() == "9 clips of aaa"

    asked.clear()
    for ask in (release, decide):
        with pytest.raises(UserError) as refused:
            ask(run(3), config, tracking, judge, lambda: "8 clips of bbb")
        for part in ("models:/frozen", "8 clips of bbb", "9 clips of aaa", "release.index", "--new-evaluation-set"):
            assert part in str(refused.value)
    assert asked == [] and champion(first.tracking_uri, "frozen") == 2
    with pytest.raises(MlflowException):
        MlflowClient(first.tracking_uri, first.tracking_uri).get_model_version("frozen", "3")

    release(run(2), config, tracking, judge, lambda: "8 clips of bbb")  # the champion itself is not judged
    assert pinned() == "9 clips of aaa"
    passed = release(run(3), config, tracking, judge, lambda: "8 clips of bbb", renew=True)
    assert passed.decision is not None and "a new evaluation set from now on" in passed.decision.reasons[-1]
    assert pinned() == "8 clips of bbb" and champion(first.tracking_uri, "frozen") == 3


def test_going_back_is_refused_in_one_line(run: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "refusals"
    uri = TrackingConfig(uri=release(run(1), ReleaseConfig(name=name), TrackingConfig()).tracking_uri)
    with pytest.raises(UserError, match="the registry refused 'refusals' .*alias"):
        rollback(name, uri, alias="no good name", to=1)

    def lost(self: MlflowClient, *_: object) -> None:
        raise MlflowException("connection reset")

    def forbidden(self: MlflowClient, *_: object) -> None:
        raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)

    for method, failure, words in (
        ("get_model_version_by_alias", lost, "connection reset"),
        ("get_model_version", lost, "connection reset"),
        ("set_registered_model_alias", forbidden, "Permission denied"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(MlflowClient, method, failure)
            with pytest.raises(UserError, match=rf"tracking.uri sqlite.*the registry refused 'refusals' \({words}"):
                rollback(name, uri, to=1)
    assert champion(uri.uri, name) == 1


def test_what_is_not_there_and_what_nobody_can_say_are_two_things(
    run: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "outages"
    tracking = TrackingConfig(uri=release(run(1), ReleaseConfig(name=name), TrackingConfig()).tracking_uri)
    uri = f"models:/{name}@champion"

    def walked(uri: str) -> None:
        with fetched(uri, tracking):
            pass

    for missing in (f"models:/{name}@nobody", "models:/nobody@champion", f"models:/{name}/9"):
        for ask in (partial(load, tracking=tracking), partial(pinned_version, tracking=tracking), walked):
            with pytest.raises(UserError, match="not in the registry"):
                ask(missing)

    def lost(*_: object, **__: object) -> None:
        raise MlflowException("connection reset")

    def gone(*_: object, **__: object) -> None:
        raise OSError("no route to the bucket")

    for place, failure in (
        ("mlflow.MlflowClient.get_model_version_by_alias", lost),
        ("mlflow.artifacts.download_artifacts", gone),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, failure)
            for ask in (partial(load, tracking=tracking), walked):
                with pytest.raises(UserError, match=r"the registry refused .*(connection reset|no route)"):
                    ask(uri)


def test_what_fails_in_the_gate_is_not_the_registrys(
    run: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tracking = ReleaseConfig(name="blamed"), TrackingConfig()
    release(run(1), config, tracking)

    def judge(champion: Path | None) -> Decision:
        raise RuntimeError("CUDA out of memory")

    for ask in (release, decide):
        with pytest.raises(RuntimeError, match="^CUDA out of memory$"):
            ask(run(2), config, tracking, judge)

    def gone(*_: object, **__: object) -> None:
        raise OSError("no route to the bucket")

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", gone)
    for ask in (release, decide):
        with pytest.raises(UserError, match=r"the registry refused 'blamed' .no route"):
            ask(run(2), config, tracking, judge)


def test_a_clip_that_only_one_could_decode_is_named(
    run: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    release(run(1), ReleaseConfig(name="unpaired"), TrackingConfig())
    recipe = Recipe(kind="finetune")
    recipe.data.index, recipe.release.name = "s3://clips/set", "unpaired"
    (run(2) / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.setattr("crossgate.runs.promotion.frozen_set", lambda recipe: "2 clips")

    def seen(recipe: Recipe, folder: Path) -> Predictions:
        keys = ["whole", "hurt"] if folder.parent == run(2) else ["whole"]
        empty = np.zeros((len(keys), 1))
        return Predictions(
            modalities=("rgb",),
            features=empty[:, None],
            embeddings=None,
            fused=empty,
            weights=None,
            logits=np.eye(2)[: len(keys)],
            unimodal_logits=None,
            present=empty == 0,
            group=np.arange(len(keys)),
            labels={"violence": np.arange(len(keys))},
            degraded=empty,
            keys=keys,
        )

    monkeypatch.setattr("crossgate.runs.promotion._predictions", seen)
    for ask in (release_run, decide_on_run):
        with pytest.raises(UserError, match="s3://clips/set: the gate .*'hurt'.*crossgate check s3://clips/set"):
            ask(run(2))


def test_the_card_says_on_what_it_was_measured(run: Callable[[int], Path], tmp_path: Path) -> None:
    card = read_card(run(1) / "model")
    metrics = {
        "test/clips": 40.0,
        "test/groups": 9.0,
        "test/accuracy": 0.8,
        "test/slice/without_audio/accuracy": 0.7,
        "test/slice/without_audio/accuracy_low": 0.6,
        "test/slice/without_audio/accuracy_high": 0.8,
        "test/gate/weight_rgb": 0.4,
    }
    text = model_card(card, metrics, {})
    for part in (
        "40 test clips of 9 groups",
        "| without_audio/accuracy | 0.7 (0.6 to 0.8) |",
        "| weight_rgb | 0.4 |",
        f"`{card.digest}`",
    ):
        assert part in text


def test_a_long_card_fits_into_the_registrys_tables(run: Callable[[int], Path]) -> None:
    """PostgreSQL refuses a description of more than 5000 characters; what is cut are rows of tables."""
    tables = ("slice", "gate", "compare")
    metrics = {f"test/{table}/without_{k}/accuracy_of_something": 0.5 for table in tables for k in range(99)}
    card = read_card(run(1) / "model")
    assert len(model_card(card, metrics, {})) > 5000
    text = description(card, metrics, {})
    assert len(text) <= 5000
    for part in ("without_0/", "more in the run", "## Limits", "## Licence", card.digest):
        assert part in text
    assert description(card, {"test/clips": 9.0}, {}) == model_card(card, {"test/clips": 9.0}, {})


def champion(uri: str, name: str = NAME) -> int:
    return int(MlflowClient(uri, uri).get_model_version_by_alias(name, "champion").version)


def version(uri: str, number: int):
    return MlflowClient(uri, uri).get_model_version(NAME, str(number))


def test_a_champion_of_another_make_is_refused(tmp_path: Path) -> None:
    from crossgate.registry.aliases import model_of
    from crossgate.tracking import connect

    server = connect(TrackingConfig(), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "MLmodel").write_text("")
    server.client.create_registered_model("other")
    made = server.client.create_model_version("other", source=str(tmp_path / "other"))
    with pytest.raises(UserError, match="no model of crossgate"), model_of(server, made):
        pass
    shutil.rmtree(tmp_path / "other")
