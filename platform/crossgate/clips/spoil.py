"""Spoils what the network sees, one modality at a time and by a known amount: the noise sweeps of a study.

========  =======  ================================================================================
modality  kind     effect at severity s (0 nothing, 1 useless or nearly so)
========  =======  ================================================================================
rgb       dark     light down to 1 - 0.95 s of it, under a sensor noise of 4 levels
rgb       blur     Gaussian of 0.5 + 3.5 s per cent of the width
rgb       noise    Gaussian noise of 60 s levels, new in every frame
flow      shake    the motion of a rattling camera over everything: 0.8 s short sides a second
audio     noise    white noise at 0.2 s^2 of full scale
audio     mute     a stretch of s of the time is silent
audio     clipped  turned up by 40 s dB and cut off at its former peak
depth     holes    0.25 + 0.65 s of the pixels without a measurement, in blotches
========  =======  ================================================================================

The measures are those of the generated clips (`synth.degrade`), applied to tensors instead of videos. What `SOUNDS`
holds changes the sound itself, before its spectrogram (`clip_tensors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from crossgate.clips.media import SAMPLE_RATE
from crossgate.clips.spectrogram import FLOOR, HOP, log_mel

Array = NDArray[Any]


def _dark(stream: Array, severity: float, rng: np.random.Generator) -> Array:
    return _levels(stream * (1 - 0.95 * severity) + rng.normal(0, 4, stream.shape))


def _blur(stream: Array, severity: float, rng: np.random.Generator) -> Array:
    sigma = (0.005 + 0.035 * severity) * stream.shape[-1]
    pictures = stream.transpose(0, 2, 3, 1)  # (T, H, W, C)
    return np.stack([cv2.GaussianBlur(one, (0, 0), sigma) for one in pictures]).transpose(0, 3, 1, 2)


def _noise(stream: Array, severity: float, rng: np.random.Generator) -> Array:
    return _levels(stream + rng.normal(0, 60 * severity, stream.shape))


def _shake(stream: Array, severity: float, rng: np.random.Generator) -> Array:
    return stream + rng.normal(0, 0.8 * severity, (len(stream), 2, 1, 1)).astype(stream.dtype)


def _hiss(stream: Array, severity: float, rng: np.random.Generator) -> Array:
    mels, steps = stream.shape[-2:]
    wave = rng.normal(0, 0.2 * severity**2, steps * HOP + SAMPLE_RATE // 10).astype(np.float32)
    return np.logaddexp(stream, log_mel(wave, mels, steps)).astype(stream.dtype)


def _mute(stream: Array, severity: float, rng: np.random.Generator) -> Array:
    steps, out = stream.shape[-1], stream.copy()
    length = round(severity * steps)
    first = int(rng.integers(0, steps - length + 1))
    out[..., first : first + length] = FLOOR
    return out


def _holes(stream: Array, severity: float, rng: np.random.Generator) -> Array:
    height, width = stream.shape[-2:]
    coarse = rng.standard_normal((9, 12)).astype(np.float32)
    field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    field = field + 0.35 * rng.standard_normal((height, width), dtype=np.float32)
    return np.where(field < np.quantile(field, 0.25 + 0.65 * severity), 0, stream).astype(stream.dtype)


def overdriven(samples: Array, severity: float) -> Array:
    """Returns ``(samples,)`` as a microphone gives them that is `severity` too loud; themselves at severity 0."""
    peak = np.abs(samples).max(initial=0)
    return np.clip(samples * 10 ** (2 * severity), -peak, peak).astype(samples.dtype)


def _levels(values: Array) -> Array:
    return np.clip(values, 0, 255).astype(np.uint8)


SWEEPS: dict[str, dict[str, Callable[[Array, float, np.random.Generator], Array]]] = {
    "rgb": {"dark": _dark, "blur": _blur, "noise": _noise},
    "flow": {"shake": _shake},
    "audio": {"noise": _hiss, "mute": _mute},
    "depth": {"holes": _holes},
}
"""Modality -> kind -> what it does to one clip's ``(T, C, H, W)``."""
SOUNDS: dict[str, dict[str, Callable[..., Array]]] = {"audio": {"clipped": overdriven}}
"""Modality -> kind -> what it does, at a `severity`, to one clip's ``(samples,)`` before its spectrogram is taken."""


def kinds(modality: str) -> tuple[str, ...]:
    """Returns all ways to spoil a modality."""
    return (*SWEEPS.get(modality, {}), *SOUNDS.get(modality, {}))


def spoil(stream: Array, modality: str, kind: str, severity: float, rng: np.random.Generator) -> Array:
    """Returns a spoiled copy of one clip's stream, of the same shape and type; itself at severity 0.

    Args:
        stream: ``(T, C, H, W)`` in the units of `modality.MODALITIES`.
        modality, kind: a key of `SWEEPS`.
        severity: 0 to 1.
        rng: of this clip.
    """
    return SWEEPS[modality][kind](stream, severity, rng) if severity > 0 else stream
