"""Tiny real videos written by PyAV, and a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from crossgate.config import ClipConfig, EncoderConfig, FusionConfig, ModelConfig
from crossgate.model.store import ModelCard, build_model, save_model

sys.path.insert(0, str(Path(__file__).parent))  # hostile

CLIP = ClipConfig(modalities=("rgb", "audio", "depth"), frames=2, size=32, seconds=1.0, mels=32)


def write_video(path: Path, seconds: float = 1.0, *, sound: bool = True, seed: int = 0, side: int = 48) -> Path:
    """A drifting texture with a tone, H.264 and AAC."""
    random = np.random.default_rng(seed)
    texture = random.integers(0, 255, (side, side, 3), np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width = video.height = side
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number in range(round(seconds * 8)):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, 2 * number, 1), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            samples = 0.3 * np.sin(np.arange(round(seconds * 16000)) * 0.2)[None].astype(np.float32)
            tone = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            tone.sample_rate = 16000
            container.mux(audio.encode(tone))
            container.mux(audio.encode(None))
    return path


def write_depth(path: Path, seconds: float = 1.0, side: int = 48) -> Path:
    """A slope of one to three metres, 16-bit FFV1."""
    slope = np.linspace(1000, 3000, side * side).reshape(side, side).astype(np.uint16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width = stream.height = side
        stream.pix_fmt = "gray16le"
        for _ in range(round(seconds * 8)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(slope, format="gray16le")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three modalities with random weights."""
    torch.manual_seed(0)
    encoders = {name: EncoderConfig(backbone="test_vit", temporal="mean") for name in ("rgb", "depth")}
    encoders["audio"] = EncoderConfig(backbone="test_convnext", temporal="mean")
    card = ModelCard(
        kind="classifier",
        model=ModelConfig(dim=16, encoders=encoders, fusion=FusionConfig(name="softmax")),
        clip=CLIP,
        task="violence",
        classes=("fight", "nofight"),
        positive="fight",
        provenance={"init": "pretrain-abc", "index": "d1g35t", "step": 12},
    )
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_model(folder, build_model(card), card)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole.mp4, mute.mp4, long.mp4, depth.mkv, broken.mp4, text.mp4, sound.wav."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "whole.mp4", seed=1)
    write_video(folder / "mute.mp4", seed=2, sound=False)
    write_video(folder / "long.mp4", 3.0, seed=3)
    write_depth(folder / "depth.mkv")
    (folder / "broken.mp4").write_bytes((folder / "whole.mp4").read_bytes()[:600])
    (folder / "text.mp4").write_text("this is no video")
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.full((1, 16000), 900, np.int16), format="s16", layout="mono")
        tone.sample_rate = 16000
        container.mux(stream.encode(tone))
    return folder
