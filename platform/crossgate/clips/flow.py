"""Optical flow between neighbouring frames: dense inverse search (Kroeger et al. 2016, ECCV), by OpenCV."""

from __future__ import annotations

import threading

import cv2
import numpy as np
from numpy.typing import NDArray

PRESET = cv2.DISOPTICAL_FLOW_PRESET_MEDIUM


class _Estimator(threading.local):
    """One a thread: it keeps its pyramids between calls, and two threads in the same one end the process."""

    def __init__(self) -> None:
        self.search = cv2.DISOpticalFlow.create(PRESET)


_ESTIMATOR = _Estimator()


def pair_flow(before: NDArray[np.uint8], after: NDArray[np.uint8], seconds: float) -> NDArray[np.float32]:
    """Returns ``(H, W, 2)`` flow from one RGB picture to another in short sides of the picture a second.

    u is to the right, v down; a value belongs to the pixel of `before`.

    Args:
        before, after: ``(H, W, 3)``.
        seconds: time between them.
    """
    grey = [np.ascontiguousarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)) for picture in (before, after)]
    if min(grey[0].shape) < 16:  # below the smallest patch of the search
        return np.zeros((*grey[0].shape, 2), np.float32)
    pixels = _ESTIMATOR.search.calc(grey[0], grey[1], None)  # type: ignore[call-overload]  # None: a new array
    return pixels / np.float32(min(grey[0].shape) * seconds)


def clip_flow(rgb: NDArray[np.uint8], fps: float) -> NDArray[np.float16] | None:
    """Returns ``(F, H, W, 2)``: at each frame the flow to the next one, at the last frame that of the one before.

    None for a clip of one frame, in which no motion can be seen.
    """
    if len(rgb) < 2:
        return None
    flow = np.empty((*rgb.shape[:3], 2), np.float16)
    for number in range(len(rgb) - 1):
        flow[number] = pair_flow(rgb[number], rgb[number + 1], 1 / fps)
    flow[-1] = flow[-2]
    return flow
