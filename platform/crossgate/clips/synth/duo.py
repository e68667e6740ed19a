"""Choreographies for two people who face each other along x: the first on the left, at the origin's either side."""

from __future__ import annotations

import numpy as np

from crossgate.clips.synth.figure import LEFT, RIGHT, forward_left
from crossgate.clips.synth.motion import (
    Cast,
    Performance,
    Sound,
    SoundKind,
    Stance,
    gait,
    mix,
    recoil,
    smooth,
    strike,
    sway,
)


def _facing(cast: Cast, distance: np.ndarray | float, crouch: float = 0.02) -> tuple[Stance, Stance]:
    """Two people at a distance (T,) or scalar; the second gives way, the first stays."""
    half = np.broadcast_to(np.asarray(distance, float), cast.t.shape)
    x = np.array([1.0, 0, 0])
    anchor = half.mean() / 2
    first = Stance(cast.bodies[0], cast.t, -x * anchor, 0.0, crouch).idle(cast.rng)
    second = Stance(cast.bodies[1], cast.t, x * (half - anchor)[:, None], np.pi, crouch).idle(cast.rng)
    return first, second


def _blow(cast: Cast, lands: bool) -> Performance:
    """A straight to the head that lands, or stops a hand's breadth short; the other's head goes back either way."""
    rng, t = cast.rng, cast.t
    hits = cast.beats((0.75, 1.0), (0.4, 0.75))
    first, second = _facing(cast, rng.uniform(0.40, 0.45) * cast.bodies[0].height)
    first.split_feet(0.4)
    second.split_feet(0.3)
    first.guard()
    if rng.random() < 0.5:
        second.guard()
    reach, give = strike(t, hits), recoil(t, hits)
    first.lean += 0.12 + 0.22 * np.maximum(reach, 0)
    first.twist += 0.55 * reach
    second.lean -= rng.uniform(0.2, 0.32) * give
    second.nod -= 0.35 * give
    second.pelvis[:, 0] += 0.08 * give
    h = second.body.height
    gap = 0.0 if lands else rng.uniform(0.12, 0.2)
    chin = second.at(0.08 * h + gap, 0.0, 0.88 * h)
    first.hands[:, RIGHT] = mix(first.hands[:, RIGHT], chin, reach)
    voice = cast.bodies[1].voice_hz
    sounds = [Sound(hit - 0.12, "whoosh", rng.uniform(0.6, 1)) for hit in hits]
    if lands:
        sounds += [Sound(hit, "thud", rng.uniform(0.5, 1.1)) for hit in hits]
        sounds += [Sound(hit + 0.06, "grunt", rng.uniform(0.4, 0.8), voice) for hit in hits if rng.random() < 0.6]
    else:
        if rng.random() < 0.4:  # who only pretends stamps a foot
            sounds += [Sound(hit, "step", rng.uniform(1.0, 1.7)) for hit in hits]
        if rng.random() < 0.25:
            sounds.append(Sound(float(hits[0]) + 0.3, "laugh", 0.6, voice))
    return Performance([first.pose(), second.pose()], sounds, list(hits) if lands else [])


def punch(cast: Cast) -> Performance:
    """Hits the other in the face."""
    return _blow(cast, lands=True)


def feint(cast: Cast) -> Performance:
    """A stage punch: the fist stops short, the other plays along."""
    return _blow(cast, lands=False)


def kick(cast: Cast) -> Performance:
    """Kicks the other in the belly."""
    rng, t = cast.rng, cast.t
    hits = cast.beats((0.9, 1.2), (0.5, 0.85))
    first, second = _facing(cast, rng.uniform(0.88, 1.0))
    first.guard()
    second.split_feet(0.25)
    reach, give = strike(t, hits, wind=0.25, out=0.18), recoil(t, hits)
    swing = np.maximum(reach, 0)
    h = second.body.height
    belly = second.at(0.05 * h, 0.0, rng.uniform(0.46, 0.58) * h)
    first.feet[:, RIGHT] = mix(first.feet[:, RIGHT], belly, reach)
    first.lean -= 0.3 * swing
    first.pelvis[:, 0] += 0.08 * swing
    second.lean += 0.35 * give
    second.pelvis[:, 0] += 0.16 * give
    sounds = [Sound(hit, "thud", rng.uniform(0.8, 1.1)) for hit in hits]
    sounds += [Sound(hit + 0.05, "grunt", 0.7, cast.bodies[1].voice_hz) for hit in hits if rng.random() < 0.6]
    return Performance([first.pose(), second.pose()], sounds, list(hits))


def shove(cast: Cast) -> Performance:
    """Pushes with both hands; the other staggers back."""
    rng, t = cast.rng, cast.t
    hits = cast.beats((1.3, 1.6), (0.35, 0.8))
    near, throw = rng.uniform(0.66, 0.76), rng.uniform(0.3, 0.5)
    give = recoil(t, hits, rise=0.3, fall=0.7)
    first, second = _facing(cast, near + throw * give)
    reach = strike(t, hits, wind=0.2, out=0.16, back=0.6)
    push, drive = np.maximum(reach, 0), np.maximum(recoil(t, hits, 0.2, 0.5), 0)
    first.split_feet(0.45)
    first.lean += 0.1 + 0.3 * np.maximum(push, drive)
    h = second.body.height
    for s, sign in ((LEFT, -1), (RIGHT, 1)):
        chest = second.at(0.08 * h, sign * 0.08 * h, 0.72 * h)
        ready = first.at(0.16 * first.body.height, -sign * 0.09 * h, 0.68 * h)
        first.hands[:, s] = mix(ready, chest, np.maximum(reach, 0.9 * drive))
    second.lean -= 0.25 * give
    second.split_feet(0.3)
    second.feet[:, LEFT] += second.at(0, 0, 0.06 * h * np.sin(np.pi * give)) - second.ground
    sounds = [Sound(hit, "thud", rng.uniform(0.3, 0.6)) for hit in hits]
    sounds += [Sound(hit - 0.05, "cloth", 1.0) for hit in hits]
    sounds += [Sound(hit + 0.25, "step", 1.2) for hit in hits]
    if rng.random() < 0.6:
        sounds.append(Sound(float(hits[0]) - 0.2, "shout", 0.7, cast.bodies[0].voice_hz))
    return Performance([first.pose(), second.pose()], sounds, list(hits))


def handshake(cast: Cast) -> Performance:
    """Shakes hands, with both hands in half of the clips; a few slap into it."""
    rng, t = cast.rng, cast.t
    first, second = _facing(cast, rng.uniform(0.72, 0.86))
    start = rng.uniform(0.1, 0.35)
    joined = smooth((t - start + 0.3) / 0.3)
    bob = 0.035 * np.sin(2 * np.pi * rng.uniform(1.8, 2.8) * (t - start)) * joined
    h = 0.5 * (first.body.height + second.body.height)
    level = rng.uniform(0.6, 0.7) * h + bob
    middle = np.stack([np.zeros_like(t), level, np.zeros_like(t)], -1)
    both = rng.random() < 0.5
    for person, side in ((first, -1), (second, 1)):
        person.split_feet(0.3)
        person.lean += 0.1
        near = np.array([side * 0.03, 0, 0])
        person.hands[:, RIGHT] = mix(person.hands[:, RIGHT], middle + near, joined)
        if both:
            person.hands[:, LEFT] = mix(person.hands[:, LEFT], middle + near * 3 + [0, 0.03, 0], joined)
    sounds = [Sound(start, "slap", rng.uniform(0.4, 0.9))] if rng.random() < 0.5 else []
    if rng.random() < 0.7:
        sounds.append(Sound(start + 0.3, "murmur", 0.6, cast.bodies[int(rng.integers(2))].voice_hz))
    return Performance([first.pose(), second.pose()], sounds, [start])


def _clinch(cast: Cast, pull: float) -> tuple[Stance, Stance]:
    """Two people holding each other at arm's bend: the still picture that grapple, hug and dance share."""
    rng = cast.rng
    first, second = _facing(cast, rng.uniform(0.40, 0.52), crouch=0.03)
    for person in (first, second):
        person.lean = person.lean + pull
    return first, second


def _hold(first: Stance, second: Stance, up: tuple[float, float], depth: float) -> None:
    """Puts each one's hands on the other's back or shoulders."""
    for person, other in ((first, second), (second, first)):
        h = other.body.height
        ahead, left = forward_left(other.heading)
        trunk = other.pelvis + ahead * (np.sin(other.lean) * 0.25 * h)[:, None]
        for s, sign in ((LEFT, -1), (RIGHT, 1)):
            offset = left * sign * 0.09 * h - ahead * depth
            person.hands[:, s] = trunk + offset + np.array([0, (up[s] - 0.515) * h, 0])


def grapple(cast: Cast) -> Performance:
    """Wrestles: both hold on, jerk and stagger."""
    rng, t = cast.rng, cast.t
    first, second = _clinch(cast, pull=rng.uniform(0.12, 0.25))
    shared = np.stack([sway(rng, t, 1.3, 0.09), sway(rng, t, 1.6, 0.025), sway(rng, t, 1.1, 0.06)], -1)
    for person in (first, second):
        person.pelvis = person.pelvis + shared + sway(rng, t, 2.0, 0.025)[:, None] * np.array([1.0, 0, 1.0])
        person.ground = person.ground + shared * [0.6, 0, 0.6]
        person.side += sway(rng, t, 1.4, 0.13)
        person.twist += sway(rng, t, 1.5, 0.2)
        person.lean += sway(rng, t, 1.5, 0.1)
        person.split_feet(0.4, lead=int(rng.integers(2)))
    _hold(first, second, up=(rng.uniform(0.66, 0.8), rng.uniform(0.66, 0.8)), depth=0.06)
    times = np.sort(rng.uniform(0.1, t[-1], max(2, round(1.5 * t[-1]))))
    sounds = [Sound(float(at), "cloth", rng.uniform(0.7, 1.2)) for at in times]
    sounds += [Sound(float(at), "step", rng.uniform(0.5, 1.0)) for at in times[::2]]
    if rng.random() < 0.5:
        sounds.append(Sound(float(times[-1]), "grunt", 0.5, cast.bodies[int(rng.integers(2))].voice_hz))
    return Performance([first.pose(), second.pose()], sounds)


def hug(cast: Cast) -> Performance:
    """Holds the other close, hardly moving."""
    rng, t = cast.rng, cast.t
    first, second = _clinch(cast, pull=rng.uniform(0.06, 0.2))
    shared = np.stack([sway(rng, t, 0.4, 0.02), np.zeros_like(t), sway(rng, t, 0.35, 0.02)], -1)
    for person in (first, second):
        person.pelvis = person.pelvis + shared
        person.side += 0.1 * rng.choice([-1, 1]) + sway(rng, t, 0.4, 0.03)
        person.split_feet(rng.uniform(0.1, 0.4), lead=int(rng.integers(2)))
    _hold(first, second, up=(rng.uniform(0.64, 0.8), rng.uniform(0.64, 0.8)), depth=0.08)
    rustles = rng.uniform(0.05, 1.2, int(rng.integers(1, 4)))
    sounds = [Sound(float(at), "cloth", rng.uniform(0.7, 1.2)) for at in rustles]
    if rng.random() < 0.5:  # pats on the back
        pats = rng.uniform(0.4, 1.0) + np.arange(2) * 0.28
        sounds += [Sound(float(at), "thud", rng.uniform(0.25, 0.5)) for at in pats]
    if rng.random() < 0.7:
        kind: SoundKind = "laugh" if rng.random() < 0.3 else "murmur"
        sounds.append(Sound(float(rng.uniform(0.3, 0.9)), kind, 0.6, cast.bodies[int(rng.integers(2))].voice_hz))
    return Performance([first.pose(), second.pose()], sounds)


def dance(cast: Cast) -> Performance:
    """Turns together, a step on every beat."""
    rng, t = cast.rng, cast.t
    first, second = _clinch(cast, pull=rng.uniform(0.0, 0.08))
    tempo, turn = rng.uniform(1.8, 2.3), rng.choice([-1, 1]) * rng.uniform(0.9, 1.5)
    angle = turn * (t - t[-1] / 2)
    phase, bounce = rng.random(), 0.02 * np.cos(2 * np.pi * tempo * t)
    steps: list[float] = []
    for person, heading in ((first, 0.0), (second, np.pi)):
        radius = float(np.abs(person.ground[:, 0]).mean())
        person.heading = angle + heading
        ahead, _ = forward_left(person.heading)
        person.ground = -ahead * radius
        person.pelvis = person.ground + np.array([0, person.body.hip_y - 0.03, 0])
        keep = person.hands
        steps = gait(person, np.full_like(t, 0.25), tempo, phase)
        person.hands, person.pelvis = keep, person.pelvis + np.array([0, 1.0, 0]) * bounce[:, None]
        person.side += 0.08 * np.sin(np.pi * tempo * t)
    _hold(first, second, up=(rng.uniform(0.64, 0.8), rng.uniform(0.64, 0.8)), depth=0.05)
    sounds = [Sound(step, "step", rng.uniform(0.7, 1.2)) for step in steps]
    if rng.random() < 0.3:
        sounds.append(Sound(float(rng.uniform(0.2, 1.0)), "laugh", 0.5, cast.bodies[1].voice_hz))
    return Performance([first.pose(), second.pose()], sounds)
