"""Timing and stances: what the choreographies of `solo` and `duo` are written in."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Literal

import numpy as np

from crossgate.clips.synth.figure import LEFT, RIGHT, Body, Pose, forward_left

SoundKind = Literal[
    "thud", "slap", "clap", "step", "cloth", "whoosh", "grunt", "shout", "murmur", "laugh"
]  # what `sound.BURSTS` can make


@dataclass(frozen=True)
class Sound:
    """Something audible: its onset in seconds, its loudness (1 is a body blow), the speaker's pitch for voices."""

    at: float
    kind: SoundKind
    loudness: float = 1.0
    pitch_hz: float = 140.0


@dataclass
class Performance:
    """The poses of everyone on stage, what can be heard, and the times of physical contact."""

    poses: list[Pose]
    sounds: list[Sound] = field(default_factory=list)
    contacts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Cast:
    """What a choreography works with.

    Attributes:
        bodies: the pair; a solo uses the first.
        t: (T,) frame times, seconds.
        facing: heading that looks at the camera, radians.
        rng: the clip's own randomness.
    """

    bodies: tuple[Body, Body]
    t: np.ndarray
    facing: float
    rng: np.random.Generator

    def beats(self, period: tuple[float, float], first: tuple[float, float]) -> np.ndarray:
        """Returns moments at a drawn, even period, all on the frame grid; none in the last 0.2 s but the first."""
        step = self.t[1] - self.t[0]
        start, gap = (max(1, round(self.rng.uniform(*drawn) / step)) for drawn in (first, period))
        return np.arange(start, max(len(self.t) - 0.2 / step, start + 1), gap) * step


def smooth(x: np.ndarray) -> np.ndarray:
    """Minimum-jerk ease from 0 to 1."""
    x = np.clip(x, 0, 1)
    return x**3 * (10 - 15 * x + 6 * x**2)


def strike(t: np.ndarray, hits: np.ndarray, wind: float = 0.25, out: float = 0.14, back: float = 0.4) -> np.ndarray:
    """Returns (T,) reach of a blow: about -0.25 at the end of the wind-up, 1 at each hit, 0 at rest."""
    reach = np.zeros_like(t)
    for hit in hits:
        windup = -0.25 * smooth((t - hit + out + wind) / wind) * (t < hit - out)
        extend = (-0.25 + 1.25 * smooth((t - hit + out) / out)) * ((t >= hit - out) & (t <= hit))
        retract = (1 - smooth((t - hit - 0.04) / back)) * (t > hit)
        blow = windup + extend + retract
        reach = np.where(np.abs(blow) > np.abs(reach), blow, reach)
    return reach


def recoil(t: np.ndarray, hits: np.ndarray, rise: float = 0.14, fall: float = 0.55) -> np.ndarray:
    """Returns (T,) the reaction to blows: 0 before each hit, 1 shortly after, back to 0."""
    shape = np.zeros_like(t)
    for hit in hits:
        shape = np.maximum(shape, smooth((t - hit) / rise) * (1 - smooth((t - hit - rise - 0.08) / fall)))
    return shape


def sway(rng: np.random.Generator, t: np.ndarray, hz: float, amount: float) -> np.ndarray:
    """Returns (T,) irregular wavering around ``hz`` with standard deviation about ``amount``."""
    total = np.zeros_like(t)
    for ratio in (0.63, 1.0, 1.57):
        total += np.sin(2 * np.pi * (hz * ratio * t + rng.random()))
    return total * amount * np.sqrt(2 / 3)


def mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """Returns ``a`` at weight 0 and ``b`` at weight 1; the weight is (T,) against (T, 3)."""
    weight = np.asarray(weight, float)
    return a + (b - a) * (weight[..., None] if weight.ndim else weight)


@dataclass
class Stance:
    """A person standing on the floor, being told what to do; `pose` hands out the result.

    Args:
        body: who.
        t: (T,) frame times.
        ground: (T, 3) or (3,) point on the floor between the feet.
        facing: (T,) or scalar direction faced.
        crouch: (T,) or scalar drop of the pelvis, metres.
    """

    body: Body
    t: np.ndarray
    ground: np.ndarray
    facing: InitVar[np.ndarray | float]
    crouch: np.ndarray | float = 0.0

    def __post_init__(self, facing: np.ndarray | float) -> None:
        n = len(self.t)
        self.ground = np.broadcast_to(np.asarray(self.ground, float), (n, 3)).copy()
        self.heading = np.broadcast_to(np.asarray(facing, float), (n,)).copy()
        self.lean, self.side, self.twist, self.nod = (np.zeros(n) for _ in range(4))
        self.pelvis = (
            self.ground
            + np.array([0, self.body.hip_y, 0])
            - np.array([0, 1.0, 0]) * (np.broadcast_to(np.asarray(self.crouch, float), (n,))[:, None])
        )
        h = self.body.height
        self.hands = np.stack([self.at(0.04 * h, s * 0.14 * h, 0.45 * h) for s in (1, -1)], 1)
        self.feet = np.stack([self.at(0.0, s * 0.065 * h, 0.045 * h) for s in (1, -1)], 1)

    def at(self, ahead, left, up) -> np.ndarray:
        """Returns (T, 3) world points given relative to the ground point and the heading, metres."""
        f, side = forward_left(self.heading)
        n = len(self.t)
        ahead, left, up = (np.broadcast_to(np.asarray(v, float), (n,))[:, None] for v in (ahead, left, up))
        return self.ground + f * ahead + side * left + np.array([0, 1.0, 0]) * up

    def idle(self, rng: np.random.Generator) -> Stance:
        """Adds the small movements of someone who stands."""
        h = self.body.height
        self.lean = self.lean + 0.03 + sway(rng, self.t, 0.5, 0.015)
        self.side = self.side + sway(rng, self.t, 0.4, 0.015)
        self.hands = self.hands + sway(rng, self.t, 0.7, 0.012 * h)[:, None, None]
        return self

    def split_feet(self, width: float, lead: int = LEFT) -> Stance:
        """Puts one foot forward and the other back by ``width`` metres in all."""
        h = self.body.height
        for s, sign in ((LEFT, 1), (RIGHT, -1)):
            ahead = width / 2 if s == lead else -width / 2
            self.feet[:, s] = self.at(ahead, sign * 0.07 * h, 0.045 * h)
        return self

    def guard(self) -> Stance:
        """Raises both fists before the chest."""
        h = self.body.height
        self.hands = np.stack([self.at(0.20 * h, s * 0.07 * h, 0.74 * h) for s in (1, -1)], 1)
        return self

    def pose(self) -> Pose:
        """Returns the finished pose."""
        return Pose(self.pelvis, self.heading, self.lean, self.side, self.twist, self.nod, self.hands, self.feet)


def gait(person: Stance, speed: np.ndarray, step_hz: float, phase: float, amount: float = 1.0) -> list[float]:
    """Makes a stance walk with its ground point; returns the moments when a heel strikes.

    Args:
        person: its ``ground`` already travels.
        speed: (T,) metres a second along the heading, negative for backwards.
        step_hz: steps a second (both feet together).
        phase: where in the cycle the clip starts, 0..1.
        amount: how far the feet lift and the arms swing.
    """
    h, cycle = person.body.height, person.t * step_hz / 2 + phase
    stride = speed / step_hz
    steps: list[float] = []
    for s, sign in ((LEFT, 1), (RIGHT, -1)):
        own = (cycle + 0.5 * s) % 1.0
        # Half a cycle in the air, half on the floor, sliding back under the body as fast as the body advances.
        air = own < 0.5
        ahead = np.where(air, -0.5 + smooth(own / 0.5), 0.5 - (own - 0.5) / 0.5)
        lift = np.where(air, np.sin(np.pi * own / 0.5), 0.0) * 0.055 * h * amount
        person.feet[:, s] = person.at(ahead * stride, sign * 0.05 * h, 0.045 * h + lift)
        swing = -np.cos(2 * np.pi * (own - 0.5)) * 0.1 * h * amount
        person.hands[:, s] = person.at(0.04 * h + swing, sign * 0.15 * h, 0.46 * h + np.abs(swing) * 0.2)
        first = ((0.5 - phase - 0.5 * s) % 1.0) / (step_hz / 2)
        steps += list(np.arange(first, person.t[-1], 2 / step_hz))
    person.pelvis = person.pelvis + np.array([0, 1.0, 0]) * (0.012 * h * np.cos(4 * np.pi * cycle))[:, None] * amount
    return sorted(float(step) for step in steps)
