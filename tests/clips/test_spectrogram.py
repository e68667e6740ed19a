"""Log-mel against the formula written down once more, slowly."""

from __future__ import annotations

import numpy as np
import pytest

from crossgate.clips.spectrogram import FLOOR, log_mel


def slow_log_mel(samples: np.ndarray, mels: int, steps: int, points: int) -> np.ndarray:
    def mel(hertz):
        return 1127.01048 * np.log(1 + hertz / 700)

    edges = np.linspace(0, mel(8000), mels + 2)
    out = np.empty((mels, steps))
    window = np.hanning(401)[:400]
    for step in range(steps):
        centre = step * 160 + 80
        piece = np.array([samples[i] if 0 <= i < len(samples) else 0 for i in range(centre - 200, centre + 200)])
        power = [abs(np.sum(piece * window * np.exp(-2j * np.pi * k * np.arange(400) / points))) ** 2
                 for k in range(points // 2 + 1)]  # fmt: skip
        for m in range(mels):
            corners = 700 * (np.exp(edges[m : m + 3] / 1127.01048) - 1)
            hertz = 16_000 * np.arange(points // 2 + 1) / points
            weight = np.interp(hertz, corners, [0, 1, 0], left=0, right=0)
            out[m, step] = np.log(np.sum(weight * power) + 1e-6)
    return out


def test_equals_the_slow_formula():
    samples = np.random.default_rng(0).normal(size=1200).astype(np.float32) * 0.1
    np.testing.assert_allclose(log_mel(samples, 16, 6), slow_log_mel(samples, 16, 6, 512), atol=2e-4)


@pytest.mark.parametrize("hertz", [200, 1000, 4000])
def test_a_tone_lights_its_bin(tone_of, hertz):
    spectrogram = log_mel(tone_of(1.0, hertz=hertz), 64, 96)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66) / 2595) - 1)
    assert abs(np.argmin(np.abs(edges[1:-1] - hertz)) - np.median(spectrogram.argmax(axis=0))) <= 1


def test_after_the_end_there_is_the_floor(tone_of):
    spectrogram = log_mel(tone_of(1.0), 64, 192)
    assert spectrogram.shape == (64, 192)
    assert (spectrogram[:, 102:] == np.float32(FLOOR)).all()
    assert spectrogram[:, :98].max(axis=0).min() > 0
    assert (log_mel(np.zeros(0, np.float32), 64, 32) == np.float32(FLOOR)).all()


def test_longer_sound_is_cut(tone_of):
    long = tone_of(3.0)
    np.testing.assert_array_equal(log_mel(long, 64, 96), log_mel(long[:20_000], 64, 96))


@pytest.mark.parametrize("mels", [8, 40, 64, 80, 81, 128, 160, 256])
def test_no_mel_bin_is_empty(mels):
    noise = np.random.default_rng(1).normal(size=16_000).astype(np.float32) * 0.1
    assert log_mel(noise, mels, 96).min() > FLOOR + 1
