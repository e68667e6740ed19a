"""Optical flow where several threads ask for it at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from crossgate.clips.flow import clip_flow


def test_threads_do_not_share_a_search() -> None:
    """A server answers requests in threads; OpenCV's search keeps pictures between calls and crashes when shared."""
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 255, (side, side, 3), np.uint8) for side in (48, 64, 96, 128) for _ in range(4)]
    films = [np.stack([np.roll(picture, step, 1) for step in range(6)]) for picture in pictures]
    alone = [clip_flow(film, 8.0) for film in films]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda film: clip_flow(film, 8.0), films * 3))
    assert all(np.array_equal(one, other) for one, other in zip(alone * 3, together, strict=True))
