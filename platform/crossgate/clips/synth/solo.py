"""Choreographies for one person, watched by a bystander in half of the clips."""

from __future__ import annotations

import numpy as np

from crossgate.clips.synth.figure import LEFT, RIGHT
from crossgate.clips.synth.motion import Cast, Performance, Sound, Stance, gait, sway


def _bystander(cast: Cast, performance: Performance) -> Performance:
    if cast.rng.random() < 0.5:
        away, side = cast.rng.uniform(-0.9, -0.3), cast.rng.choice([-1, 1]) * cast.rng.uniform(0.7, 1.0)
        ahead = np.array([np.cos(cast.facing), 0, np.sin(cast.facing)])
        left = np.array([np.sin(cast.facing), 0, -np.cos(cast.facing)])
        heading = cast.facing + cast.rng.uniform(-0.9, 0.9)
        watcher = Stance(cast.bodies[1], cast.t, ahead * away + left * side, heading).idle(cast.rng)
        performance.poses.append(watcher.pose())
    return performance


def _before_the_chest(cast: Cast, gap: float) -> tuple[Stance, np.ndarray]:
    """Both hands swing apart and together before the chest, down to ``gap`` metres."""
    rng, t, body = cast.rng, cast.t, cast.bodies[0]
    spot = np.array([rng.uniform(-0.25, 0.25), 0, rng.uniform(-0.25, 0.25)])
    person = Stance(body, t, spot, cast.facing + rng.uniform(-0.5, 0.5)).idle(rng)
    beats = cast.beats((0.34, 0.52), (0.15, 0.4))
    period = beats[1] - beats[0] if len(beats) > 1 else 0.45
    width = rng.uniform(0.11, 0.17) * body.height
    open_ = 0.5 - 0.5 * np.cos(2 * np.pi * (t - beats[0]) / period)  # 0 on every beat
    half = gap / 2 + open_ * width
    h, up = body.height, rng.uniform(0.68, 0.76)
    for s, sign in ((LEFT, 1), (RIGHT, -1)):
        person.hands[:, s] = person.at(0.2 * h, sign * half, (up + 0.03 * open_) * h)
    return person, beats[beats < t[-1]]


def clap(cast: Cast) -> Performance:
    """Claps: the palms meet on every beat."""
    person, beats = _before_the_chest(cast, gap=0.05)
    sounds = [Sound(beat, "clap", cast.rng.uniform(0.7, 1.0)) for beat in beats]
    return _bystander(cast, Performance([person.pose()], sounds, list(beats)))


def wave(cast: Cast) -> Performance:
    """Waves both hands as in a clap; they stop short and nothing sounds but cloth."""
    person, beats = _before_the_chest(cast, gap=cast.rng.uniform(0.10, 0.16))
    sounds = [Sound(beat, "cloth", 0.5) for beat in beats[::2]]
    return _bystander(cast, Performance([person.pose()], sounds))


def _walk(cast: Cast, direction: float) -> Performance:
    rng, t, body = cast.rng, cast.t, cast.bodies[0]
    speed = direction * rng.uniform(0.55, 0.8)
    heading = cast.facing + rng.uniform(-0.25, 0.25)
    middle = np.array([rng.uniform(-0.3, 0.3), 0, rng.uniform(-0.2, 0.2)])
    ahead = np.array([np.cos(heading), 0, np.sin(heading)])
    ground = middle + ahead * (speed * (t - t[-1] / 2))[:, None]
    person = Stance(body, t, ground, heading, crouch=0.015 * body.height)
    steps = gait(person, np.full_like(t, speed), rng.uniform(1.7, 2.2), rng.random())
    person.lean = 0.04 + sway(rng, t, 0.8, 0.01)
    sounds = [Sound(step, "step", rng.uniform(0.8, 1.1)) for step in steps]
    return _bystander(cast, Performance([person.pose()], sounds))


def advance(cast: Cast) -> Performance:
    """Walks towards the camera."""
    return _walk(cast, 1.0)


def retreat(cast: Cast) -> Performance:
    """Walks backwards, away from the camera, facing it."""
    return _walk(cast, -1.0)
