"""The serving image, where it was built: a model released into the rendered registry and served as rendered.

podman build --format docker -f k8s/image/Containerfile.serving -t crossgate-serving:0.1.0 .
pytest -m slow tests/k8s/test_serving_image.py
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from kuberay import wait_for
from manifests import Object, named, objects_of
from pods import Node, missing, podman

from crossgate import __version__
from crossgate.clips.synth import generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLASSES = ("wave", "walk", "fall")

FINISHED_RUN = f"""
import json, sys
from pathlib import Path
from crossgate.config import ClipConfig, EncoderConfig, ModelConfig
from crossgate.model.store import ModelCard, build_model, save_model

run = Path(sys.argv[1])
encoders = {{name: EncoderConfig(backbone="test_vit", temporal="mean") for name in ("rgb", "audio")}}
card = ModelCard(
    kind="classifier",
    model=ModelConfig(dim=16, encoders=encoders),
    clip=ClipConfig(modalities=("rgb", "audio"), frames=2, size=32, seconds=1.0, mels=32),
    task="action",
    classes={CLASSES},
)
save_model(run / "model", build_model(card), card)
(run / "recipe.yaml").write_text("kind: finetune")
results = {{"format": 1, "metrics": {{"test/accuracy": 0.5}}, "provenance": {{}}}}
(run / "results.json").write_text(json.dumps(results))
"""
"""What the job release expects, by the image's own code: a fine-tuning run, of a small model that nobody trained."""


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    for name in ("crossgate", "crossgate-serving"):
        if reason := missing(f"{name}:{__version__}"):
            pytest.skip(reason)


def things() -> list[Object]:
    """The local tracking server and volumes, beside the shipped release and serving."""
    wanted = {"RayJob/release", "Deployment/serving"}
    return objects_of("local") + [thing for thing in objects_of("gpu") if named(thing) in wanted]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "node").mkdir()
    with Node.up(tmp_path / "node", things()) as node:
        node.play("mlflow")
        yield node


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def test_released_model_is_served_to_those_who_bring_their_video(node: Node, tmp_path: Path) -> None:
    job = node.things["RayJob/release"]
    words = job["spec"]["entrypoint"].split()
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod: Any = group["template"]["spec"]
    node.run("train", pod, pod["containers"][0], ["python", "-c", FINISHED_RUN, words[2]])
    server = f"http://{node.hosts['mlflow']}:5000"
    wait_for(lambda: answers(f"{server}/health"), "the tracking server does not answer")
    assert requests.get(f"{server}/api/2.0/mlflow/experiments/search?max_results=1", timeout=9).status_code == 403
    assert "version 1 as models:/crossgate-action@champion" in node.run("release", pod, pod["containers"][0], words)

    served = node.play("serving")
    url = f"http://{node.hosts['serving']}:5001"
    assert not answers(f"{url}/ping")  # ready once loaded, not before
    wait_for(lambda: answers(f"{url}/ping"), "the model is not served")
    (generated,) = list(generate(tmp_path / "clips", clips=1, workers=1).parent.rglob("*.mp4"))[:1]
    inputs = [base64.b64encode(generated.read_bytes()).decode(), "/etc/passwd", "http://mlflow:5000/health"]
    answer = requests.post(f"{url}/invocations", json={"inputs": inputs}, timeout=120)
    assert answer.status_code == 200, answer.text
    *good, path, address = answer.json()["predictions"]
    assert len(good) == 2  # a clip a second
    assert all(row["error"] is None and row["label"] in CLASSES for row in good)
    assert path["label"] is address["label"] is None and path["error"] and address["error"]
    said = podman("exec", f"{served}-model", "bash", "-c", "id -u; command -v gcc cc make ray; touch /x; true")
    assert "1000" in said.split() and "Read-only file system" in said and "/gcc" not in said and "/ray" not in said
