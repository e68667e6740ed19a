"""A served model that uses flow, asked by many at once, some of them hostile: each gets the rows of its own request."""

from __future__ import annotations

import base64
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from free_ports import free_port
from hostile import hostile
from servers import serving

from crossgate.config import ClipConfig, EncoderConfig, FusionConfig, ModelConfig
from crossgate.model.store import ModelCard, build_model, save_model
from crossgate.registry.package import package_model
from crossgate.registry.predictor import Predictor

NAMES = ("rgb", "flow", "audio")
AT_ONCE, REQUESTS = 8, 48


@pytest.fixture(scope="module")
def flow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    card = ModelCard(
        kind="classifier",
        model=ModelConfig(
            dim=16,
            encoders={name: EncoderConfig(backbone="test_convnext", temporal="mean") for name in NAMES},
            fusion=FusionConfig(name="softmax"),
        ),
        clip=ClipConfig(modalities=NAMES, frames=2, size=32, seconds=1.0, mels=32),
        task="violence",
        classes=("fight", "nofight"),
        positive="fight",
    )
    folder = tmp_path_factory.mktemp("flow") / "model"
    save_model(folder, build_model(card), card)
    return folder


def test_many_at_once_each_get_their_own_rows(flow_model: Path, videos: Path, tmp_path: Path) -> None:
    good = [(videos / name).read_bytes() for name in ("whole.mp4", "mute.mp4", "long.mp4")]
    wanted = [Predictor(flow_model).predict([one])["scores"].tolist() for one in good]
    assert Predictor(flow_model).predict([good[0]])["modalities"][0] == list(NAMES)
    bad = [
        base64.b64encode(item).decode() for _, item in hostile(good[0], tmp_path) if isinstance(item, bytes) and item
    ]
    package_model(flow_model, tmp_path / "package")
    port = free_port()
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "mlflow", "models", "serve", "-p", str(port)]
    command += ["--env-manager", "local", "-m", str(tmp_path / "package")]

    def ask(number: int) -> list[dict[str, Any]]:
        texts = [bad[number % len(bad)], base64.b64encode(good[number % 3]).decode(), bad[(7 * number + 1) % len(bad)]]
        answer = requests.post(f"{url}/invocations", json={"inputs": texts}, timeout=120)
        assert answer.status_code == 200, answer.text[:500]
        return answer.json()["predictions"]

    with serving(command, f"{url}/ping", tmp_path / "log", {}), ThreadPoolExecutor(AT_ONCE) as pool:
        for number, (first, *rows, last) in enumerate(pool.map(ask, range(REQUESTS))):
            assert first["error"] and last["error"] and first["label"] is None and last["label"] is None
            assert [row["error"] for row in rows] == [None] * len(wanted[number % 3])
            for row, scores in zip(rows, wanted[number % 3], strict=True):
                assert row["scores"] == pytest.approx(scores, abs=1e-5)
        assert requests.get(f"{url}/ping", timeout=60).ok
