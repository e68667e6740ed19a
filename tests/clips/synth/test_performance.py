"""What is performed: contact where it should be, heard when it is seen."""

from __future__ import annotations

import numpy as np
import pytest
from synth_features import read_sound

from crossgate.clips.synth.actions import ACTIONS
from crossgate.clips.synth.figure import RIGHT, draw_body, joints
from crossgate.clips.synth.files import write_video
from crossgate.clips.synth.motion import Cast
from crossgate.clips.synth.scene import draw_scene
from crossgate.clips.synth.sound import BURSTS, RATE, Sound, track

BY_NAME = {action.name: action for action in ACTIONS}


def perform(name: str, seed: int, seconds: float = 2.0):
    rng = np.random.default_rng([seed, 77])
    cast = Cast((draw_body(rng), draw_body(rng)), np.arange(int(12 * seconds)) / 12, np.pi / 2, rng)
    done = BY_NAME[name].perform(cast)
    return cast, done, [joints(body, pose) for body, pose in zip(cast.bodies, done.poses)]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("seconds", [1.0, 2.0, 5.0])
def test_every_action_is_finite_and_stays_on_stage(name, seconds):
    cast, done, people = perform(name, 0, seconds)
    for person in people:
        for joint in person.values():
            assert np.isfinite(joint).all()
        assert np.abs(person["pelvis"][:, [0, 2]]).max() < 2.8
        assert person["ankles"][..., 1].min() > -0.02
    assert len(done.poses) == 2 or not BY_NAME[name].pair
    assert all(sound.kind in BURSTS for sound in done.sounds)


@pytest.mark.parametrize("seed", range(5))
def test_a_punch_lands_and_a_feint_stops_short(seed):
    gaps = {}
    for name in ("punch", "feint"):
        cast, done, (first, second) = perform(name, seed)
        gaps[name] = np.linalg.norm(first["hands"][:, RIGHT] - second["head"], axis=-1).min()
        assert bool(done.contacts) == (name == "punch")
        assert any(sound.kind == "thud" for sound in done.sounds) == (name == "punch")
    assert gaps["punch"] < 0.2
    assert gaps["feint"] > gaps["punch"] + 0.03


@pytest.mark.parametrize("seed", range(5))
def test_palms_meet_in_a_clap_and_not_in_a_wave(seed):
    gap = {}
    for name in ("clap", "wave"):
        cast, done, (first, *_) = perform(name, seed)
        apart = np.linalg.norm(first["wrists"][:, 0] - first["wrists"][:, 1], axis=-1)
        gap[name] = apart.min()
        for contact in done.contacts:
            assert apart[np.abs(cast.t - contact).argmin()] < 0.12
    assert gap["clap"] < 0.08 < gap["wave"]


def test_the_walker_comes_nearer_or_goes_away():
    for name, sign in (("advance", 1), ("retreat", -1)):
        cast, _, (first, *_) = perform(name, 4)
        assert sign * (first["pelvis"][-1, 2] - first["pelvis"][0, 2]) > 0.8  # the camera stands at +z


def test_a_grapple_moves_more_than_a_dance_and_a_dance_more_than_a_hug():
    def speed(name: str) -> float:
        return np.mean([np.abs(np.diff(perform(name, s)[2][0]["head"], axis=0)).mean() for s in range(6)])

    assert speed("grapple") > 1.2 * speed("dance") > 2.5 * speed("hug")


@pytest.mark.parametrize("name", ["punch", "kick", "clap"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_impact_is_heard_in_the_frame_that_shows_it(tmp_path, name, seed):
    cast, done, _ = perform(name, seed)
    scene = draw_scene(np.random.default_rng(0))
    impacts = [sound for sound in done.sounds if sound.kind in ("thud", "clap")]
    wave = track(impacts, scene, 2.0, np.random.default_rng(seed))
    frames = np.zeros((24, 48, 64, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", frames, 12, wave)
    heard = np.abs(read_sound(tmp_path / "clip.mp4"))  # through AAC and the container's clock
    quiet = np.median(heard)
    onset = np.flatnonzero(heard > 12 * quiet)[0] / RATE
    assert onset == pytest.approx(done.contacts[0], abs=0.5 / 12)


def test_a_hit_is_the_moment_of_greatest_reach():
    cast, done, (first, second) = perform("kick", 1)
    gap = np.linalg.norm(first["ankles"][:, RIGHT] - second["pelvis"], axis=-1)
    assert abs(cast.t[gap.argmin()] - min(done.contacts, key=lambda c: abs(c - cast.t[gap.argmin()]))) < 1.5 / 12


@pytest.mark.parametrize("kind", BURSTS)
def test_every_sound_starts_where_it_is_placed_and_fits_the_track(kind):
    scene = draw_scene(np.random.default_rng(1))
    silence = track([], scene, 1.0, np.random.default_rng(3))
    for at in (0.4, 0.98, -0.1):
        wave = track([Sound(at, kind)], scene, 1.0, np.random.default_rng(3))
        assert wave.shape == (RATE,)
        assert wave.dtype == np.float32
        assert np.abs(wave).max() <= 1
    wave = track([Sound(0.4, kind)], scene, 1.0, np.random.default_rng(3))
    assert np.abs(wave[int(0.4 * RATE) :]).sum() > 1.2 * np.abs(silence[int(0.4 * RATE) :]).sum()
