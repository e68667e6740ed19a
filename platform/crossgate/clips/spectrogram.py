"""Log-mel spectrogram: 25 ms Hann window, 10 ms hop, triangular filters on the HTK mel scale from 0 to 8 kHz."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from crossgate.clips.media import SAMPLE_RATE

WINDOW = SAMPLE_RATE * 25 // 1000
HOP = SAMPLE_RATE * 10 // 1000
FLOOR_POWER = 1e-6
FLOOR = float(np.log(FLOOR_POWER))
"""Value of silence, and of time steps after the sound's end."""


def log_mel(samples: NDArray[np.float32], mels: int, steps: int) -> NDArray[np.float32]:
    """Returns ``(mels, steps)``: natural log of mel power, step i centred on sample ``(i + 1/2) * HOP``.

    Samples beyond either end count as zeros, so that steps after the end of the sound hold `FLOOR`.

    Args:
        samples: ``(samples,)`` in -1..1 at 16 kHz.
        mels: number of filters.
        steps: number of time steps.
    """
    lead = (WINDOW - HOP) // 2
    padded = np.zeros((steps - 1) * HOP + WINDOW, np.float32)
    kept = samples[: len(padded) - lead]
    padded[lead : lead + len(kept)] = kept
    pieces = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]  # (steps, WINDOW)
    spectrum = np.fft.rfft(pieces * _hann(), n=_points(mels), axis=-1)
    power = spectrum.real**2 + spectrum.imag**2  # (steps, bins)
    return np.log(_filters(mels) @ power.T + np.float32(FLOOR_POWER), dtype=np.float32)


def _points(mels: int) -> int:
    """Returns an FFT length at which even the narrowest filter holds a bin."""
    return 512 if mels <= 80 else 1024 if mels <= 160 else 2048


@lru_cache(maxsize=1)
def _hann() -> NDArray[np.float32]:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@lru_cache(maxsize=8)
def _filters(mels: int) -> NDArray[np.float32]:
    """Returns ``(mels, bins)`` triangles of height 1 whose corners are evenly spaced in mel."""
    highest = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, mels + 2) / 2595) - 1)  # Hz
    bins = np.linspace(0, SAMPLE_RATE / 2, _points(mels) // 2 + 1)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)
