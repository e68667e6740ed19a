"""Videos of noise that moves, with or without a tone."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def write_video(path: Path, seed: int, *, frames: int = 12, sound: bool = False) -> None:
    pictures = np.random.default_rng(seed).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=12, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        track = target.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for number in range(frames):
            rolled = np.roll(pictures, number, axis=1)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(rolled, format="rgb24")))
        target.mux(stream.encode(None))
        if track is not None:
            wave = np.sin(np.arange(16_000 * frames // 12) * 0.3).astype(np.float32)[None] * 0.3
            block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            block.sample_rate, block.pts = 16_000, 0
            target.mux(track.encode(block))
            target.mux(track.encode(None))
