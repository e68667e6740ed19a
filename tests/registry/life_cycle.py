"""The life of a name in a registry: champion, a worse challenger refused, an equal one promoted, and back again."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlflow import MlflowClient

from crossgate.config import TrackingConfig
from crossgate.model.store import load_model, save_model
from crossgate.registry.aliases import rollback
from crossgate.registry.release import ReleasedModel
from crossgate.runs.release import decide_on_run, release_run

NAME = "crossgate-life"


def variant(run: Path, folder: Path, factor: float) -> Path:
    """Returns a finished run whose heads' linear layers are the run's times a factor: -1 answers the opposite."""
    model, card = load_model(run / "model")
    state = {
        name: factor * tensor if "head" in name and ".linear." in name else tensor
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True)
    save_model(folder / "model", model, card, state)
    for name in ("recipe.yaml", "results.json"):
        shutil.copy(run / name, folder / name)
    return folder


def live(run: Path, folder: Path, uri: str, index: str) -> list[str]:
    """Leads a name through its life with the run's model as champion; returns what was said, a line a station.

    Args:
        run: finished fine-tuning run.
        folder: for the other two.
        uri: of the MLflow server.
        index: whose test clips decide.
    """
    said = []
    settings = (f"release.index={index}", "release.latency_ratio=4")  # a busy machine must not decide

    def released(one: Path) -> ReleasedModel:
        done = release_run(one, name=NAME, tracking_uri=uri, settings=settings)
        assert done.decision is not None
        said.append(f"version {done.version} is {done.alias}: {'; '.join(done.decision.reasons)}")
        return done

    first = released(run)
    assert (first.version, first.alias) == (1, "champion")
    worse, equal = variant(run, folder / "worse", -1.0), variant(run, folder / "equal", 1.001)
    dry = decide_on_run(worse, name=NAME, tracking_uri=uri, settings=settings)
    assert not dry.passed, dry.text()
    assert versions(uri) == {1: "challenger champion"}
    second = released(worse)
    assert (second.version, second.alias) == (2, "challenger")
    assert any(reason.startswith("REFUSED") for reason in second.decision.reasons)  # type: ignore[union-attr]
    assert versions(uri) == {1: "champion", 2: "challenger"}
    third = released(equal)
    assert (third.version, third.alias) == (3, "champion")
    assert versions(uri) == {1: "", 2: "", 3: "challenger champion"}
    assert rollback(NAME, TrackingConfig(uri=uri)) == (3, 1)
    assert versions(uri) == {1: "champion", 2: "", 3: "challenger"}
    said.append("rolled back: version 1 is champion")
    return said


def versions(uri: str) -> dict[int, str]:
    """Returns version -> its aliases, as the server has them."""
    client = MlflowClient(uri, uri)
    found = {int(one.version): "" for one in client.search_model_versions(f"name = '{NAME}'")}
    for alias, number in sorted(client.get_registered_model(NAME).aliases.items()):
        found[int(number)] = f"{found[int(number)]} {alias}".strip()
    return found
