"""The serving image, where it was built: a model released into the rendered registry and served as rendered.

podman build --format docker -f k8s/image/Containerfile.serving -t crossgate-serving:0.1.0 .
pytest -m slow tests/k8s/test_serving_image.py
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
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
    """The local tracking server and volumes, beside what is shipped to release, serve and score."""
    wanted = {"RayJob/release", "RayJob/predict", "Deployment/serving"}
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


def worker_of(job: Object) -> tuple[Object, Object]:
    """The pod of a job's workers, and its container."""
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    return pod, pod["containers"][0]


def test_released_model_is_served_and_scores(node: Node, tmp_path: Path) -> None:
    job = node.things["RayJob/release"]
    words = job["spec"]["entrypoint"].split()
    worker = worker_of(job)
    node.run("train", *worker, ["python", "-c", FINISHED_RUN, words[2]])
    server = f"http://{node.hosts['mlflow']}:5000"
    wait_for(lambda: answers(f"{server}/health"), "the tracking server does not answer")
    assert requests.get(f"{server}/api/2.0/mlflow/experiments/search?max_results=1", timeout=9).status_code == 403
    assert "version 1 as models:/crossgate-action@champion" in node.run("release", *worker, words)

    served = node.play("serving")
    url = f"http://{node.hosts['serving']}:5001"
    assert not answers(f"{url}/ping")  # ready once loaded, not before
    wait_for(lambda: answers(f"{url}/ping"), "the model is not served")
    videos = node.folder / "claims" / "runs" / "videos"
    videos.mkdir()
    manifest = generate(tmp_path / "clips", clips=2, workers=1)
    for path in pd.read_csv(manifest)["path"]:
        generated = Path(shutil.copy2(manifest.parent / path, videos))
    inputs = [base64.b64encode(generated.read_bytes()).decode(), "/etc/passwd", "http://mlflow:5000/health"]
    answer = requests.post(f"{url}/invocations", json={"inputs": inputs}, timeout=120)
    assert answer.status_code == 200, answer.text
    *good, path, address = answer.json()["predictions"]
    assert len(good) == 2  # a clip a second
    assert all(row["error"] is None and row["label"] in CLASSES for row in good)
    assert path["label"] is address["label"] is None and path["error"] and address["error"]
    said = podman("exec", f"{served}-model", "bash", "-c", "id -u; command -v gcc cc make ray; touch /x; true")
    assert "1000" in said.split() and "Read-only file system" in said and "/gcc" not in said and "/ray" not in said

    job = node.things["RayJob/predict"]
    scores = videos.with_name("scores")
    scores.mkdir()
    scores.chmod(0o777)
    places = {"s3://example-bucket/videos": "/runs/videos", "s3://example-bucket/scores": "/runs/scores"}
    words = [places.get(word, word) for word in job["spec"]["entrypoint"].split()]
    assert "4 rows of 2 videos in /runs/scores, 0 of them with an error" in node.run("predict", *worker_of(job), words)
    assert set(pq.read_table(scores / "part-00000.parquet")["label"].to_pylist()) <= set(CLASSES)
