"""Writing a clip: H.264 with AAC in MP4, depth as FFV1 beside it; whole files only."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from crossgate.clips.synth.sound import RATE


def _drain(container: av.container.OutputContainer, stream, frame) -> None:
    for packet in stream.encode(frame):
        container.mux(packet)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write_video(path: Path, frames: np.ndarray, fps: int, sound: np.ndarray | None) -> None:
    """Writes (T, H, W, 3) uint8 RGB and, unless it is None, (samples,) float32 sound at 16 kHz."""
    part = _beside(path)
    try:
        with av.open(str(part), "w", format="mp4") as container:
            video = container.add_stream("libx264", rate=fps)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "yuv420p"
            # Without lookahead: with it, x264 gives other bits from run to run for the same frames.
            video.options = {"preset": "veryfast", "crf": "21", "tune": "zerolatency", "threads": "1"}
            video.options |= {"x264-params": "sliced-threads=0:weightp=0:mbtree=0:log-level=none"}
            video.codec_context.thread_count = 1
            audio = None
            if sound is not None:
                audio = container.add_stream("aac", rate=RATE, layout="mono")
                audio.bit_rate = 48_000
            for i, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, fps)
                _drain(container, video, frame)
            _drain(container, video, None)
            if audio is not None and sound is not None:
                samples = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts, samples.time_base = RATE, 0, Fraction(1, RATE)
                _drain(container, audio, samples)
                _drain(container, audio, None)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_depth(path: Path, depth: np.ndarray, fps: int) -> None:
    """Writes (T, H, W) uint16 millimetres, without loss."""
    part = _beside(path)
    try:
        with av.open(str(part), "w", format="matroska") as container:
            video = container.add_stream("ffv1", rate=fps)
            video.height, video.width = depth.shape[1:]
            video.pix_fmt = "gray16le"
            video.codec_context.thread_count = 1
            for i, picture in enumerate(depth):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="gray16le")
                frame.pts, frame.time_base = i, Fraction(1, fps)
                _drain(container, video, frame)
            _drain(container, video, None)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
