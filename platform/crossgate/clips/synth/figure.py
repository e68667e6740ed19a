"""An articulated person: proportions, a pose that says where hands and feet are, and the limbs that follow from it.

World: x to the right, y up, z towards the viewer, metres; the floor is y = 0. Choreography places pelvis, hands and
feet; elbows and knees come from two-bone inverse kinematics, so a fist can be put exactly on another body's chin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

UP = np.array([0.0, 1.0, 0.0])
LEFT, RIGHT = 0, 1


@dataclass(frozen=True)
class Body:
    """Proportions and clothes of one person; lengths are fractions of the height, colours RGB in 0..1."""

    height: float
    build: float
    skin: np.ndarray
    hair: np.ndarray
    top: np.ndarray
    trim: np.ndarray
    bottom: np.ndarray
    shoes: np.ndarray
    pattern: str
    sleeves: bool
    shorts: bool
    voice_hz: float

    @property
    def shoulder_y(self) -> float:
        """Height of the shoulders when standing, metres."""
        return 0.815 * self.height

    @property
    def hip_y(self) -> float:
        """Height of the pelvis when standing with soft knees, metres."""
        return 0.515 * self.height


def draw_body(rng: np.random.Generator) -> Body:
    """Returns a random person."""

    def colour(low: float, high: float) -> np.ndarray:
        hue = rng.uniform(0, 2 * np.pi)
        wheel = 0.5 + 0.5 * np.cos(hue + np.array([0.0, 2.094, 4.189]))
        value, saturation = rng.uniform(low, high), rng.uniform(0.15, 0.9)
        return value * (1 - saturation + saturation * wheel)

    tone = rng.uniform(0, 1)
    return Body(
        height=rng.uniform(1.55, 1.92),
        build=rng.uniform(0.9, 1.18),
        skin=(1 - tone) * np.array([0.96, 0.78, 0.66]) + tone * np.array([0.42, 0.27, 0.19]),
        hair=rng.choice([[0.09, 0.07, 0.06], [0.3, 0.19, 0.1], [0.72, 0.58, 0.34], [0.55, 0.54, 0.53]]),
        top=colour(0.35, 0.95),
        trim=colour(0.4, 1.0),
        bottom=colour(0.18, 0.6),
        shoes=colour(0.15, 0.9),
        pattern=str(rng.choice(["plain", "plain", "stripes", "check"])),
        sleeves=bool(rng.random() < 0.55),
        shorts=bool(rng.random() < 0.25),
        voice_hz=rng.uniform(95, 230),
    )


@dataclass(frozen=True)
class Pose:
    """Where one person is in each of T frames.

    Attributes:
        pelvis: (T, 3) centre of the hips.
        heading: (T,) direction faced, radians about the vertical; 0 looks along +x, pi/2 towards the viewer.
        lean: (T,) trunk forward, radians. side: (T,) trunk to the left. twist: (T,) shoulders turned to the left.
        nod: (T,) head forward, radians.
        hands, feet: (T, 2, 3) wrists and ankles, left then right.
    """

    pelvis: np.ndarray
    heading: np.ndarray
    lean: np.ndarray
    side: np.ndarray
    twist: np.ndarray
    nod: np.ndarray
    hands: np.ndarray
    feet: np.ndarray


def forward_left(heading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the unit vectors (..., 3) ahead and to the left of a heading."""
    cos, sin, zero = np.cos(heading), np.sin(heading), np.zeros_like(heading)
    return np.stack([cos, zero, sin], -1), np.stack([sin, zero, -cos], -1)


def two_bones(
    root: np.ndarray, target: np.ndarray, upper: float, lower: float, pole: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places a middle joint and an end joint, (..., 3) each.

    The end is the target, or the nearest point in reach; the middle bends towards ``pole``.
    """
    reach = target - root
    distance = np.linalg.norm(reach, axis=-1, keepdims=True)
    along = reach / np.maximum(distance, 1e-6)
    distance = np.clip(distance, abs(upper - lower) + 1e-3, (upper + lower) * 0.999)
    foot = (upper**2 - lower**2 + distance**2) / (2 * distance)
    bend = np.sqrt(np.maximum(upper**2 - foot**2, 0))
    across = pole - (pole * along).sum(-1, keepdims=True) * along
    across /= np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-6)
    return root + along * foot + across * bend, root + along * distance


def joints(body: Body, pose: Pose) -> dict[str, np.ndarray]:
    """Returns the joints by name: (T, 3), or (T, 2, 3) for those that come left and right."""
    h = body.height
    ahead, left = forward_left(pose.heading)  # (T, 3)
    spine = UP * np.cos(pose.lean)[:, None] * np.cos(pose.side)[:, None]
    spine = spine + ahead * np.sin(pose.lean)[:, None] + left * np.sin(pose.side)[:, None]
    spine /= np.linalg.norm(spine, axis=-1, keepdims=True)
    neck = pose.pelvis + spine * 0.30 * h
    face, _ = forward_left(pose.heading + 0.6 * pose.twist)
    gaze = face - (face * spine).sum(-1, keepdims=True) * spine
    gaze /= np.linalg.norm(gaze, axis=-1, keepdims=True)
    crown = spine * np.cos(pose.nod)[:, None] + gaze * np.sin(pose.nod)[:, None]
    look = gaze * np.cos(pose.nod)[:, None] - spine * np.sin(pose.nod)[:, None]

    _, across = forward_left(pose.heading + pose.twist)
    sides = np.array([1.0, -1.0])[None, :, None]
    shoulders = neck[:, None] - spine[:, None] * 0.02 * h + sides * across[:, None] * 0.108 * h
    hips = pose.pelvis[:, None] + sides * left[:, None] * 0.05 * h
    elbow_pole = -0.8 * UP + sides * 0.45 * across[:, None] - 0.35 * face[:, None]
    elbows, wrists = two_bones(shoulders, pose.hands, 0.172 * h, 0.155 * h, elbow_pole)
    knees, ankles = two_bones(hips, pose.feet, 0.245 * h, 0.243 * h, ahead[:, None] + 0.12 * sides * left[:, None])
    fingers = wrists - elbows
    fingers /= np.maximum(np.linalg.norm(fingers, axis=-1, keepdims=True), 1e-6)
    raised = np.clip((ankles[..., 1:2] - 0.1 * h) / (0.25 * h), 0, 1)
    toes = ankles + 0.095 * h * ahead[:, None] - UP * 0.02 * h * (1 - 2 * raised)
    return {
        "pelvis": pose.pelvis, "neck": neck, "head": neck + crown * 0.095 * h, "crown": crown, "look": look,
        "shoulders": shoulders, "hips": hips, "elbows": elbows, "wrists": wrists,
        "hands": wrists + fingers * 0.035 * h, "knees": knees, "ankles": ankles, "toes": toes,
    }  # fmt: skip


@dataclass(frozen=True)
class Limbs:
    """Rounded cones: a sphere of radius ``radii[c, 0]`` at ``a`` swept to ``radii[c, 1]`` at ``b``.

    Attributes:
        a, b: (T, C, 3) metres. radii: (C, 2) metres.
        colour, trim: (C, 3) cloth and the second colour of its pattern. pattern: (C,) 0 plain, 1 stripes, 2 check.
    """

    a: np.ndarray
    b: np.ndarray
    radii: np.ndarray
    colour: np.ndarray
    trim: np.ndarray
    pattern: np.ndarray

    def moved(self, matrix: np.ndarray, offset: np.ndarray) -> Limbs:
        """Returns the limbs at ``matrix @ point + offset``."""
        return replace(self, a=self.a @ matrix.T + offset, b=self.b @ matrix.T + offset)


def limbs(body: Body, j: dict[str, np.ndarray]) -> Limbs:
    """Dresses the joints of one person."""
    h, w = body.height, body.height * body.build
    sleeve, hose = (body.top if body.sleeves else body.skin), (body.skin if body.shorts else body.bottom)
    cloth = {"plain": 0, "stripes": 1, "check": 2}[body.pattern]
    crown, look = j["crown"], j["look"]
    parts: list[tuple] = []

    def part(a, b, r0, r1, colour, pattern=0):
        parts.append((a, b, r0, r1, colour, pattern))

    head = j["head"]
    part(head - crown * 0.025 * h + look * 0.012 * h, head + crown * 0.015 * h, 0.046 * h, 0.056 * h, body.skin)
    part(head + crown * 0.026 * h - look * 0.008 * h, head - look * 0.02 * h, 0.055 * h, 0.052 * h, body.hair)
    part(j["neck"] - crown * 0.01 * h, head - crown * 0.03 * h, 0.032 * w, 0.03 * w, body.skin)
    part(j["shoulders"][:, 0], j["shoulders"][:, 1], 0.042 * w, 0.042 * w, body.top, cloth)
    belly = 0.5 * (j["pelvis"] + j["neck"])
    for s in (LEFT, RIGHT):
        inner = 0.55 * j["shoulders"][:, s] + 0.45 * j["neck"] - crown * 0.03 * h
        part(inner, 0.4 * j["hips"][:, s] + 0.6 * belly, 0.066 * w, 0.062 * w, body.top, cloth)
        part(belly, j["hips"][:, s], 0.066 * w, 0.062 * w, body.top, cloth)
        part(j["hips"][:, s], j["knees"][:, s], 0.06 * w, 0.042 * w, body.bottom)
        part(j["knees"][:, s], j["ankles"][:, s], 0.041 * w, 0.026 * w, hose)
        part(j["ankles"][:, s] - UP * 0.012 * h, j["toes"][:, s], 0.026 * h, 0.021 * h, body.shoes)
        part(j["shoulders"][:, s], j["elbows"][:, s], 0.036 * w, 0.029 * w, body.top, cloth)
        part(j["elbows"][:, s], j["wrists"][:, s], 0.028 * w, 0.022 * w, sleeve)
        part(j["wrists"][:, s], j["hands"][:, s], 0.023 * h, 0.026 * h, body.skin)
    a, b, r0, r1, colour, pattern = zip(*parts, strict=True)
    return Limbs(
        a=np.stack(a, 1), b=np.stack(b, 1), radii=np.stack([r0, r1], 1), colour=np.stack(colour),
        trim=np.repeat(body.trim[None], len(parts), 0), pattern=np.array(pattern),
    )  # fmt: skip


def together(people: list[Limbs]) -> Limbs:
    """Joins the limbs of several people along C."""
    return Limbs(
        **{
            name: np.concatenate([getattr(p, name) for p in people], axis=1 if name in ("a", "b") else 0)
            for name in ("a", "b", "radii", "colour", "trim", "pattern")
        }
    )
