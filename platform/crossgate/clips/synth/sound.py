"""The sound track: shaped noise bursts and buzzing syllables at the moments that the choreography names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crossgate.clips.synth.motion import Sound, SoundKind
from crossgate.clips.synth.scene import Scene

RATE = 16_000


def _noise(rng: np.random.Generator, seconds: float, low: float, high: float) -> np.ndarray:
    """Returns noise of unit power between two frequencies, with soft edges."""
    n = int(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    f = np.maximum(np.fft.rfftfreq(n, 1 / RATE), 1.0)
    wave = np.fft.irfft(spectrum / np.sqrt((1 + (low / f) ** 4) * (1 + (f / high) ** 4)), n)
    return wave / (wave.std() + 1e-9)


def _decay(n: int, tau: float, attack: float = 0.002) -> np.ndarray:
    t = np.arange(n) / RATE
    return np.minimum(t / attack, 1) * np.exp(-t / tau)


def _thud(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    low = _noise(rng, 0.25, 50, 260)
    snap = _noise(rng, 0.25, 400, 2200)
    return 0.26 * low * _decay(len(low), 0.05) + 0.12 * snap * _decay(len(snap), 0.015)


def _slap(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    wave = _noise(rng, 0.12, 600, 3500)
    return 0.2 * wave * _decay(len(wave), 0.018)


def _clap(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    wave = _noise(rng, 0.15, 900, 4500)
    return 0.2 * wave * _decay(len(wave), 0.02)


def _step(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    heel, scuff = _noise(rng, 0.15, 70, 450), _noise(rng, 0.15, 1200, 4000)
    return 0.11 * heel * _decay(len(heel), 0.03) + 0.025 * scuff * _decay(len(scuff), 0.03, attack=0.01)


def _bell(rng: np.random.Generator, seconds: float, low: float, high: float, level: float) -> np.ndarray:
    wave = _noise(rng, seconds, low, high)
    return level * wave * np.hanning(len(wave))


def _cloth(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    return _bell(rng, rng.uniform(0.18, 0.32), 1500, 6000, 0.035)


def _whoosh(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    return _bell(rng, 0.2, 350, 1800, 0.05)


def _syllable(rng: np.random.Generator, pitch: float, seconds: float, breath: float) -> np.ndarray:
    """A voiced burst: harmonics under two formants, some of it breath."""
    n = int(seconds * RATE)
    t = np.arange(n) / RATE
    bend = pitch * (t + rng.uniform(-0.4, 0.1) * t**2 / (2 * seconds))
    formants = rng.uniform(400, 800), rng.uniform(1000, 1900)
    wave = np.zeros(n)
    for k in range(1, int(3000 / pitch)):
        gain = sum(np.exp(-(((k * pitch - f) / 220) ** 2)) for f in formants) + 0.12 / k
        wave += gain * np.sin(2 * np.pi * k * bend + rng.uniform(0, 6.28))
    wave = wave / (wave.std() + 1e-9) + breath * _noise(rng, seconds, 500, 3000)[:n]
    return wave * np.hanning(n) ** 0.6


def _grunt(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    return 0.12 * _syllable(rng, 0.85 * sound.pitch_hz, rng.uniform(0.15, 0.28), breath=0.6)


def _shout(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    return 0.2 * _syllable(rng, 1.5 * sound.pitch_hz, rng.uniform(0.25, 0.4), breath=0.3)


def _phrase(rng: np.random.Generator, pitches: np.ndarray, beat: float, level: float) -> np.ndarray:
    wave = np.zeros(int((beat * len(pitches) + 0.1) * RATE))
    for i, pitch in enumerate(pitches):
        part = _syllable(rng, pitch, beat * rng.uniform(0.6, 1.0), breath=0.3)
        start = int(i * beat * RATE)
        wave[start : start + len(part)] += level * part
    return wave


def _murmur(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    return _phrase(rng, sound.pitch_hz * rng.uniform(0.85, 1.2, int(rng.integers(2, 5))), 0.2, 0.08)


def _laugh(rng: np.random.Generator, sound: Sound) -> np.ndarray:
    return _phrase(rng, 1.5 * sound.pitch_hz * np.linspace(1.1, 0.9, int(rng.integers(3, 6))), 0.17, 0.1)


BURSTS: dict[str, Callable[[np.random.Generator, Sound], np.ndarray]] = {
    "thud": _thud, "slap": _slap, "clap": _clap, "step": _step, "cloth": _cloth, "whoosh": _whoosh,
    "grunt": _grunt, "shout": _shout, "murmur": _murmur, "laugh": _laugh,
}  # fmt: skip


_OFF_STAGE: tuple[tuple[SoundKind, float, float], ...] = (
    ("murmur", 0.3, 0.6), ("thud", 0.2, 0.6), ("step", 0.15, 0.5), ("cloth", 0.3, 1.0), ("laugh", 0.08, 0.5),
    ("grunt", 0.1, 0.5), ("slap", 0.08, 0.6),
)  # fmt: skip


def distractors(rng: np.random.Generator, seconds: float) -> list[Sound]:
    """Returns what happens off stage: voices, a door, steps in the corridor. It says nothing about the action."""
    sounds = []
    for kind, chance, loud in _OFF_STAGE:
        if rng.random() < chance:
            sounds.append(Sound(rng.uniform(0, seconds), kind, loud * rng.uniform(0.5, 1), rng.uniform(95, 230)))
    return sounds


def track(sounds: list[Sound], scene: Scene, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Returns (samples,) float32 mono at `RATE`, within -1..1: the room's tone with the sounds over it."""
    n = int(round(seconds * RATE))
    t = np.arange(n) / RATE
    wave = scene.ambience * _noise(rng, seconds + 0.01, 40, 900)[:n] + scene.hum * np.sin(2 * np.pi * 50 * t)
    wave += scene.ambience * 0.3 * rng.standard_normal(n)
    for sound in sounds:
        burst = sound.loudness * BURSTS[sound.kind](rng, sound)
        start = max(0, int(round(sound.at * RATE)))
        burst = burst[: max(0, n - start)]
        wave[start : start + len(burst)] += burst
    return np.tanh(wave * rng.uniform(0.7, 1.3)).astype(np.float32)
