"""Degradations: there where the manifest says so, and only there."""

from __future__ import annotations

import numpy as np
import pytest
from synth_features import read_depth, read_sound, read_video, rows

from crossgate.clips.synth.clip import record
from crossgate.clips.synth.degrade import KINDS, Degradation, draw_degradations
from crossgate.clips.synth.plan import plan_clip

HOW = {"seed": 3, "size": (128, 96), "fps": 12, "seconds": 2.0}


def take(*degradations: Degradation, index: int = 1):
    plan = plan_clip(3, index, 6, 0.0)
    return record(type(plan)(plan.index, plan.group, plan.action, degradations), **HOW)


def sharpness(frames: np.ndarray) -> float:
    return float(np.abs(np.diff(frames.astype(int), axis=2)).mean())


def still(frames: np.ndarray) -> float:
    """Share of neighbouring frames that are the same."""
    return float(np.mean([np.array_equal(a, b) for a, b in zip(frames, frames[1:])]))


@pytest.mark.parametrize(("modality", "kind"), [(m, k) for m, kinds in KINDS.items() for k, _ in kinds])
def test_one_degradation_spoils_its_own_stream_only(modality, kind):
    clean, spoiled = take(), take(Degradation(modality, kind, 0.8))
    assert np.array_equal(clean.frames, spoiled.frames) == (modality not in ("rgb", "flow"))
    same_sound = spoiled.sound is not None and np.array_equal(clean.sound, spoiled.sound)
    assert same_sound == (modality != "audio")
    same_depth = spoiled.depth is not None and np.array_equal(clean.depth, spoiled.depth)
    assert same_depth == (modality != "depth")


def test_each_kind_does_what_its_name_says():
    clean = take()
    assert take(Degradation("rgb", "dark", 0.8)).frames.mean() < 0.4 * clean.frames.mean()
    assert sharpness(take(Degradation("rgb", "blur", 0.8)).frames) < 0.6 * sharpness(clean.frames)
    assert sharpness(take(Degradation("rgb", "noise", 0.8)).frames) > 2 * sharpness(clean.frames)
    assert still(clean.frames) == 0
    assert still(take(Degradation("flow", "freeze", 0.8)).frames) > 0.7
    wander = np.abs(np.diff(take(Degradation("flow", "shake", 0.8)).frames.astype(int), axis=0)).mean()
    assert wander > 1.5 * np.abs(np.diff(clean.frames.astype(int), axis=0)).mean()
    assert take(Degradation("audio", "missing", 1.0)).sound is None
    assert np.median(np.abs(take(Degradation("audio", "noise", 0.8)).sound)) > 4 * np.median(np.abs(clean.sound))
    assert take(Degradation("depth", "missing", 1.0)).depth is None
    holes = (take(Degradation("depth", "dropout", 0.8)).depth == 0).mean()
    assert holes == pytest.approx(0.25 + 0.65 * 0.8, abs=0.08)


@pytest.mark.parametrize(
    ("modality", "kind"), [("rgb", "dark"), ("rgb", "noise"), ("audio", "noise"), ("depth", "dropout")]
)
def test_more_severity_is_more_damage(modality, kind):
    clean = take()

    def damage(severity: float) -> float:
        spoiled = take(Degradation(modality, kind, severity))
        name = {"rgb": "frames", "audio": "sound", "depth": "depth"}[modality]
        return float(np.abs(getattr(spoiled, name).astype(float) - getattr(clean, name)).mean())

    assert damage(0.4) < damage(0.7) < damage(1.0)


def test_the_share_and_the_number_of_spoiled_modalities():
    rng = np.random.default_rng(0)
    drawn = [draw_degradations(rng, 0.5) for _ in range(2000)]
    assert np.mean([bool(d) for d in drawn]) == pytest.approx(0.5, abs=0.05)
    assert max(len(d) for d in drawn) == 3  # one modality at least stays clean
    assert all(len({x.modality for x in d}) == len(d) for d in drawn)
    assert {x.modality for d in drawn for x in d} == set(KINDS)
    assert not any(draw_degradations(rng, 0.0) for _ in range(50))


def test_the_manifest_tells_the_truth_about_the_files(few):
    seen = set()
    for row in rows(few):
        told = dict(part.split("=") for part in row["degradation"].split(";") if part)
        for name in KINDS:
            severity = float(row[f"degraded_{name}"])
            assert (severity > 0) == (name in told)
            assert severity == (float(told[name].split(":")[1]) if name in told else 0)
        seen |= {f"{name}={value.split(':')[0]}" for name, value in told.items()}
        frames, wave = read_video(few.parent / row["path"]), read_sound(few.parent / row["path"])
        assert (wave is None) == (told.get("audio", "").startswith("missing"))
        assert (wave is not None) == bool(int(row["has_audio"]))
        assert (row["depth_path"] == "") == (told.get("depth", "").startswith("missing"))
        if not any(told.get("rgb", "").startswith(kind) for kind in ("dark", "blur")):
            assert frames.mean() > 50
            assert sharpness(frames) > 1.5
        if "rgb" not in told and "flow" not in told:
            assert sharpness(frames) < 12
        if row["depth_path"]:
            holes = (read_depth(few.parent / row["depth_path"]) == 0).mean()
            assert (holes > 0.3) == ("depth" in told)
    assert len(seen) >= 7
