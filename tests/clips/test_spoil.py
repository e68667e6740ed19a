"""Spoiled tensors: nothing at severity 0, more with severity, only what the kind says, the same for the same clip."""

from __future__ import annotations

import numpy as np
import pytest

from crossgate.clips.spectrogram import FLOOR
from crossgate.clips.spoil import SWEEPS, kinds, overdriven, spoil

KINDS = [(name, kind) for name, kinds in SWEEPS.items() for kind in kinds]


def stream(modality: str) -> np.ndarray:
    """A clip's tensor with structure in it."""
    rng = np.random.default_rng(0)
    if modality == "rgb":
        return rng.integers(60, 200, (3, 3, 32, 32)).astype(np.uint8)
    if modality == "flow":
        return rng.normal(0, 0.1, (3, 2, 32, 32)).astype(np.float32)
    if modality == "audio":
        return rng.normal(-4, 1, (1, 1, 32, 64)).astype(np.float32)
    return rng.uniform(1, 5, (3, 1, 32, 32)).astype(np.float32)


def harm(modality: str, kind: str, severity: float) -> float:
    """Mean change over several draws."""
    clean = stream(modality)
    draws = [spoil(clean, modality, kind, severity, np.random.default_rng(i)) for i in range(8)]
    return float(np.mean([np.abs(one.astype(float) - clean).mean() for one in draws]))


@pytest.mark.parametrize(("modality", "kind"), KINDS)
def test_it_grows_with_severity_and_keeps_shape_type_and_source(modality: str, kind: str) -> None:
    clean = stream(modality)
    before = clean.copy()
    for severity in (0.0, 0.5, 1.0):
        one = spoil(clean, modality, kind, severity, np.random.default_rng(3))
        again = spoil(clean, modality, kind, severity, np.random.default_rng(3))
        assert one.shape == clean.shape and one.dtype == clean.dtype
        assert np.array_equal(one, again) and np.isfinite(one).all()
        assert np.array_equal(one, clean) == (severity == 0)
    assert np.array_equal(clean, before), "the clip itself was changed"
    assert 0 < harm(modality, kind, 0.25) < harm(modality, kind, 1.0)


def test_each_kind_does_what_its_table_says() -> None:
    rng = np.random.default_rng(1)
    holes = spoil(stream("depth"), "depth", "holes", 0.5, rng)
    assert np.mean(holes == 0) == pytest.approx(0.25 + 0.65 * 0.5, abs=0.01)
    mute = spoil(stream("audio"), "audio", "mute", 0.5, rng)
    assert np.mean((mute == FLOOR).all(axis=(0, 1, 2))) == pytest.approx(0.5, abs=0.02)
    assert (spoil(stream("audio"), "audio", "noise", 1.0, rng) >= stream("audio")).all(), "noise adds power"
    dark = spoil(stream("rgb"), "rgb", "dark", 1.0, rng)
    assert dark.mean() < 0.1 * stream("rgb").mean()
    shaken = spoil(stream("flow"), "flow", "shake", 1.0, rng) - stream("flow")
    assert np.ptp(shaken, axis=(2, 3)).max() < 1e-5, "a rattle moves the whole picture alike"


def test_sound_that_is_too_loud_is_cut_off_at_its_peak() -> None:
    wave = np.sin(np.linspace(0, 40 * np.pi, 4000)).astype(np.float32) * 0.3
    assert np.array_equal(overdriven(wave, 0.0), wave)
    half, whole = overdriven(wave, 0.5), overdriven(wave, 1.0)
    peak = np.abs(wave).max()
    for spoiled in (half, whole):
        assert spoiled.dtype == wave.dtype and np.abs(spoiled).max() == peak
    assert np.mean(np.abs(half) == peak) < np.mean(np.abs(whole) == peak) and np.mean(np.abs(whole) == peak) > 0.99
    faint = np.abs(wave) < peak / 20
    assert np.allclose(half[faint], 10 * wave[faint]), "20 dB louder where nothing is cut off"
    assert not overdriven(np.zeros(10, np.float32), 1.0).any()
    assert overdriven(np.zeros(0, np.float32), 1.0).shape == (0,)
    assert kinds("audio") == (*SWEEPS["audio"], "clipped") and kinds("rgb") == tuple(SWEEPS["rgb"])
