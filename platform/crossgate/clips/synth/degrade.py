"""Spoiled streams: what each clip draws, and what it does to the pixels, the sound and the depth.

========  =========  ======================================================================================
modality  kind       effect at severity s (0 clean, 1 useless or nearly so)
========  =========  ======================================================================================
rgb       dark       light down to 1 - 0.95 s of it, with the sensor's noise left as it was
rgb       blur       Gaussian of 0.5 + 3.5 s per cent of the width
rgb       noise      Gaussian noise of 60 s levels, new in every frame
flow      shake      the colour camera rattles by 3.5 s per cent of the width from frame to frame
flow      freeze     frames stand still, for 2 + round(5 s) frames each
audio     missing    no track at all
audio     noise      white noise at 0.2 s^2 of full scale over everything (a body blow is about 0.25)
depth     missing    no file at all
depth     dropout    0.25 + 0.65 s of the pixels without a measurement, in drifting blotches
========  =========  ======================================================================================

Flow is computed from the same frames as rgb, so that ``flow`` degradations leave every single frame good (the
depth sensor stands beside the colour camera and does not rattle), while ``rgb`` ones cost flow something too.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

KINDS: dict[str, tuple[tuple[str, float], ...]] = {  # modality -> kinds with their chances
    "rgb": (("dark", 0.4), ("blur", 0.25), ("noise", 0.35)),
    "flow": (("shake", 0.5), ("freeze", 0.5)),
    "audio": (("missing", 0.4), ("noise", 0.6)),
    "depth": (("missing", 0.25), ("dropout", 0.75)),
}


@dataclass(frozen=True)
class Degradation:
    """One spoiled modality."""

    modality: str
    kind: str
    severity: float

    def __str__(self) -> str:
        return f"{self.modality}={self.kind}:{self.severity:.2f}"


def draw_degradations(rng: np.random.Generator, share: float) -> tuple[Degradation, ...]:
    """Returns nothing with chance ``1 - share``, else one to three spoiled modalities: one at least stays clean."""
    if rng.random() >= share:
        return ()
    names = list(KINDS)
    chosen = rng.choice(len(names), size=rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]), replace=False)
    drawn = []
    for name in (names[i] for i in sorted(chosen)):
        kinds, chances = zip(*KINDS[name], strict=True)
        kind = str(rng.choice(kinds, p=chances))
        severity = 1.0 if kind == "missing" else round(float(rng.uniform(0.4, 1.0)), 2)
        drawn.append(Degradation(name, kind, severity))
    return tuple(drawn)


def find(degradations: tuple[Degradation, ...], modality: str) -> Degradation | None:
    """Returns the degradation of one modality, if it has one."""
    return next((d for d in degradations if d.modality == modality), None)


def spoil_frames(
    frames: np.ndarray, grain: float, degradations: tuple[Degradation, ...], rng: np.random.Generator
) -> np.ndarray:
    """Returns (T, H, W, 3) uint8 as the colour camera records them: its grain, and what is wrong with rgb and flow."""
    rgb, flow = find(degradations, "rgb"), find(degradations, "flow")
    width = frames.shape[2]
    gain, sigma = 1.0, grain
    if flow:
        frames = _shake(frames, flow.severity, rng) if flow.kind == "shake" else _freeze(frames, flow.severity)
    if rgb and rgb.kind == "dark":
        gain = 1 - 0.95 * rgb.severity
    if rgb and rgb.kind == "noise":
        sigma = grain + 60 * rgb.severity
    if rgb and rgb.kind == "blur":
        spread = (0.005 + 0.035 * rgb.severity) * width
        frames = np.stack([cv2.GaussianBlur(frame, (0, 0), spread) for frame in frames])
    noise = rng.standard_normal(frames.shape[:3], dtype=np.float32) * np.float32(sigma)
    if flow and flow.kind == "freeze":
        noise = noise[_held(len(frames), flow.severity)]
    return np.clip(frames * np.float32(gain) + noise[..., None], 0, 255).astype(np.uint8)


def _shake(frames: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    height, width = frames.shape[1:3]
    limit = height // 4
    offsets = np.clip(np.round(rng.normal(0, 0.035 * severity * width, (len(frames), 2))), -limit, limit).astype(int)
    wide = np.pad(frames, ((0, 0), (limit, limit), (limit, limit), (0, 0)), mode="reflect")
    return np.stack(
        [
            frame[limit + dy : limit + dy + height, limit + dx : limit + dx + width]
            for frame, (dx, dy) in zip(wide, offsets, strict=True)
        ]
    )


def _held(count: int, severity: float) -> np.ndarray:
    hold = 2 + round(5 * severity)
    return np.arange(count) // hold * hold


def _freeze(frames: np.ndarray, severity: float) -> np.ndarray:
    return frames[_held(len(frames), severity)]


def spoil_sound(wave: np.ndarray, degradations: tuple[Degradation, ...], rng: np.random.Generator) -> np.ndarray | None:
    """Returns (samples,) float32 as recorded, or None where there is no track."""
    audio = find(degradations, "audio")
    if audio is None:
        return wave
    if audio.kind == "missing":
        return None
    noise = rng.standard_normal(len(wave)).astype(np.float32)
    return np.tanh(wave + 0.2 * audio.severity**2 * noise)


def spoil_depth(
    depth: np.ndarray, degradations: tuple[Degradation, ...], rng: np.random.Generator
) -> np.ndarray | None:
    """Returns (T, H, W) uint16 millimetres as recorded, or None where there is no depth sensor."""
    spoiled = find(degradations, "depth")
    if spoiled is None:
        return depth
    if spoiled.kind == "missing":
        return None
    count, height, width = depth.shape
    first, last = rng.standard_normal((2, 9, 12)).astype(np.float32)
    share = 0.25 + 0.65 * spoiled.severity
    out = depth.copy()
    for i, weight in enumerate(np.linspace(0, 1, count)):
        field = cv2.resize(
            first * np.cos(weight) + last * np.sin(weight), (width, height), interpolation=cv2.INTER_CUBIC
        )
        field = field + 0.35 * rng.standard_normal((height, width), dtype=np.float32)
        out[i][field < np.quantile(field[::3, ::3], share)] = 0
    return out
