"""Small videos written by PyAV: texture that moves by a known amount, with or without sound and depth."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

WriteVideo = Callable[..., Path]


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A coloured picture with structure at many scales."""
    noise = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    picture = sum(cv2.GaussianBlur(noise, (0, 0), sigma) * sigma for sigma in (2, 5, 11))
    low, high = picture.min(), picture.max()
    return ((picture - low) / (high - low) * 255).astype(np.uint8)


def shifted(frames: int, height: int, width: int, step: tuple[float, float], seed: int = 0) -> np.ndarray:
    """``(F, H, W, 3)``: texture that moves by `step` pixels (right, down) a frame."""
    margin = 64
    base = texture(height + 2 * margin, width + 2 * margin, seed)
    pictures = []
    for number in range(frames):
        move = np.float32([[1, 0, step[0] * number - margin], [0, 1, step[1] * number - margin]])
        pictures.append(cv2.warpAffine(base, move, (width, height), flags=cv2.INTER_CUBIC))
    return np.stack(pictures)


def tone(seconds: float, rate: int = 16_000, hertz: float = 1000.0, loudness: float = 0.5) -> np.ndarray:
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: float = 25.0,
    *,
    sound: np.ndarray | None = None,
    sound_rate: int = 44_100,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """Writes RGB ``(F, H, W, 3)`` or 16-bit ``(F, H, W)`` frames, and mono float sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(10_000)
    with av.open(str(path), "w") as target:
        stream: Any = target.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        track: Any = target.add_stream("aac", rate=sound_rate, layout="mono") if sound is not None else None
        given = "rgb24" if frames.ndim == 4 else "gray16le"
        for picture in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=given)))
        target.mux(stream.encode(None))
        if sound is not None:
            block = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            block.sample_rate, block.pts = sound_rate, 0
            target.mux(track.encode(block))
            target.mux(track.encode(None))
    return path


@pytest.fixture
def moving(tmp_path: Path) -> WriteVideo:
    """Writes a two-second video of texture that moves; keyword arguments as `write_video`."""

    def write(
        name: str = "moving.mp4", *, frames: int = 50, size=(96, 128), step=(1.0, 0.5), seed=0, **settings
    ) -> Path:
        return write_video(tmp_path / name, shifted(frames, *size, step, seed), **settings)

    return write


@pytest.fixture
def texture_clip() -> Callable[[int, int, int], np.ndarray]:
    """Makes ``(F, H, W, 3)`` of moving texture."""
    return lambda frames, height, width: shifted(frames, height, width, (1.5, 0.5))


@pytest.fixture
def shifted_clip() -> Callable[..., np.ndarray]:
    """`shifted` itself."""
    return shifted


@pytest.fixture
def tone_of() -> Callable[..., np.ndarray]:
    """`tone` itself."""
    return tone


@pytest.fixture
def save_video() -> WriteVideo:
    """`write_video` itself."""
    return write_video
