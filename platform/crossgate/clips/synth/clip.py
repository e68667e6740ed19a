"""One clip, from its plan to what is recorded of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from crossgate.clips.synth.backdrop import Backdrop, render_backdrop
from crossgate.clips.synth.degrade import spoil_depth, spoil_frames, spoil_sound
from crossgate.clips.synth.figure import joints, limbs, together
from crossgate.clips.synth.motion import Cast, Performance
from crossgate.clips.synth.plan import ClipPlan, clip_stream, scene_stream
from crossgate.clips.synth.render import SUPERSAMPLE, render
from crossgate.clips.synth.scene import Scene, draw_scene
from crossgate.clips.synth.sound import distractors, track

_MARGIN = 8  # supersampled pixels that a camera's unrest may use up


@dataclass(frozen=True)
class Recording:
    """What the sensors give.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        sound: (samples,) float32 at 16 kHz, or None. depth: (T, H, W) uint16 millimetres, or None.
        performance: what really happened.
    """

    frames: np.ndarray
    sound: np.ndarray | None
    depth: np.ndarray | None
    performance: Performance


@lru_cache(maxsize=2)
def _place(seed: int, group: int, size: tuple[int, int]) -> tuple[Scene, Backdrop]:
    scene = draw_scene(scene_stream(seed, group), aspect=size[0] / size[1])
    return scene, render_backdrop(scene, size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE, _MARGIN)


def _unrest(rng: np.random.Generator, t: np.ndarray, amount: float) -> np.ndarray:
    """Returns (T, 2) whole supersampled pixels of slow camera drift."""
    phase, hz = rng.uniform(0, 2 * np.pi, (2, 2)), rng.uniform(0.4, 1.3, (2, 2))
    drift = np.sin(2 * np.pi * hz * t[:, None, None] + phase).sum(-1) * amount
    return np.clip(np.round(drift), -_MARGIN, _MARGIN).astype(int)


def record(plan: ClipPlan, seed: int, size: tuple[int, int], fps: int, seconds: float) -> Recording:
    """Performs, films and spoils one clip; the result depends on the seed and the plan alone."""
    scene, backdrop = _place(seed, plan.group, size)
    rng = clip_stream(seed, plan.index)
    t = np.arange(max(2, round(fps * seconds))) / fps
    turn = scene.turn + rng.uniform(-0.2, 0.2) + (np.pi if rng.random() < 0.5 else 0.0)
    bodies = scene.bodies if rng.random() < 0.5 else scene.bodies[::-1]
    performance = plan.action.perform(Cast(bodies, t, np.pi / 2 + turn, rng))

    everyone = together(
        [limbs(body, joints(body, pose)) for body, pose in zip(bodies, performance.poses, strict=False)]
    )
    cos, sin = np.cos(turn), np.sin(turn)
    spot = np.array([rng.uniform(-0.2, 0.2), 0.0, rng.uniform(-0.25, 0.2)])
    everyone = everyone.moved(np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]), spot)
    shake = _unrest(rng, t, scene.shake * size[0] * SUPERSAMPLE)
    frames, depth = render(everyone, scene, backdrop, size, shake)
    duration = len(t) / fps
    wave = track(performance.sounds + distractors(rng, duration), scene, duration, rng)
    return Recording(
        spoil_frames(frames, scene.grain, plan.degradations, rng),
        spoil_sound(wave, plan.degradations, rng),
        spoil_depth(depth, plan.degradations, rng),
        performance,
    )
