"""From a model directory to a folder that `mlflow.pyfunc` loads: safetensors, code as text, pinned requirements."""

from __future__ import annotations

import base64
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import numpy as np

from crossgate import environment
from crossgate.errors import UserError
from crossgate.model.store import CARD, WEIGHTS, ModelCard, model_directory, read_card
from crossgate.registry.sources import Settings

_PACKAGE = Path(__file__).resolve().parents[1]
# What a consumer gets of crossgate: the ground floor, the clips' way to tensors, the network, the predictor.
_FILES = (
    "__init__.py",
    "_torchvision.py",
    "_version.py",
    "errors.py",
    "modality.py",
    "registry/__init__.py",
    "registry/predictor.py",
    "registry/sources.py",
)
_ROOMS = ("clips", "config", "model")
_LEFT_OUT = ("__pycache__", "synth", "manifest.py", "preview.py")
REQUIREMENTS = (
    "torch",
    "torchvision",  # timm imports it
    "timm",
    "av",
    "opencv-python-headless",
    "numpy",
    "pandas",
    "safetensors",
    "pydantic",
    "fsspec",
    "s3fs",
)


def package_model(model_dir: str | Path, out_dir: str | Path, metadata: Mapping[str, Any] | None = None) -> ModelCard:
    """Writes the MLflow model of a classifier's model directory, and runs it once on its input example.

    Args:
        model_dir: model directory, or a run directory that has one.
        out_dir: must not exist yet.
        metadata: JSON values that travel with the model.

    Returns:
        The model's card.

    Raises:
        UserError: no model there, or one without classes.
    """
    model_dir = model_directory(model_dir)
    card = read_card(model_dir)
    if card.kind != "classifier":
        raise UserError("a pretrained model has no classes to predict", where=model_dir, cure="fine-tune it first")
    environment.calm_mlflow()
    import mlflow.pyfunc

    # Recorded warnings are not shown; these are about hints that leave open what names a video.
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True):
        weights = Path(scratch) / "model"
        weights.mkdir()
        for name in (WEIGHTS, CARD):
            shutil.copy2(model_dir / name, weights / name)
        logging.getLogger("mlflow.models.signature").setLevel(logging.WARNING)
        mlflow.pyfunc.save_model(
            path=str(out_dir),
            python_model=str(_PACKAGE / "registry" / "pyfunc_model.py"),
            artifacts={"model": str(weights)},
            code_paths=[str(consumer_code(Path(scratch) / "code"))],
            model_config=Settings().model_dump(),
            pip_requirements=pinned_requirements(),
            input_example=[example_video(card.clip.seconds)],
            metadata={
                "task": card.task,
                "classes": list(card.classes),
                "positive": card.positive,
                "threshold": card.threshold,
                "digest": card.digest,
                **(metadata or {}),
            },
        )
    return card


def consumer_code(folder: Path) -> Path:
    """Copies the part of crossgate that a consumer needs into ``folder/crossgate`` and returns that."""
    target = folder / "crossgate"
    for room in _ROOMS:
        shutil.copytree(_PACKAGE / room, target / room, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    for file in _FILES:
        (target / file).parent.mkdir(exist_ok=True)
        shutil.copy2(_PACKAGE / file, target / file)
    return target


def pinned_requirements() -> list[str]:
    """Returns the versions that this model was made with, without builds such as ``+cpu``."""
    pins = []
    for name in REQUIREMENTS:
        try:
            pins.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            raise UserError("not installed, so its version cannot be pinned", where=name) from None
    return pins


def example_video(seconds: float) -> str:
    """Returns a small video, a bright square on its way across a dark picture, as base64."""
    rate, side = 8, 64
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        count = max(2, round(seconds * rate))
        for number in range(count):
            picture = np.full((side, side, 3), 30, np.uint8)
            left = number * (side - 16) // count
            picture[24:40, left : left + 16] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return base64.b64encode(file.getvalue()).decode()
