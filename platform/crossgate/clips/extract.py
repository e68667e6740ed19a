"""From a video file to clips: frames at storage size, flow, sound and depth, cut into pieces of equal length."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.clips.depth import Estimator, estimate, to_millimetres
from crossgate.clips.flow import clip_flow
from crossgate.clips.media import DEFAULT_LIMITS, Frames, Limits, Sound, Source, name_of, storage_size
from crossgate.modality import MODALITIES


@dataclass
class RawClip:
    """One clip at storage resolution.

    Attributes:
        streams: of the modalities that the clip has: rgb ``(F, H, W, 3)`` uint8; flow ``(F, H, W, 2)`` float16 in
            short sides a second; audio ``(samples,)`` float32 at 16 kHz; depth ``(F, H, W)`` uint16 in millimetres.
        fps: frames a second of rgb, flow and depth.
        start: seconds from the video's first frame.
        depth_kind: ``sensor`` or ``estimated``; empty without depth.
    """

    streams: dict[str, NDArray[Any]] = field(default_factory=dict)
    fps: float = 12.0
    start: float = 0.0
    depth_kind: str = ""

    @property
    def frames(self) -> int:
        """Number of frames F."""
        return next((len(self.streams[name]) for name in ("rgb", "flow", "depth") if name in self.streams), 0)

    @property
    def seconds(self) -> float:
        """True length."""
        return self.frames / self.fps


def extract(source: Source, **settings: Any) -> list[RawClip]:
    """Returns all clips of a video: `iter_clips` as a list."""
    return list(iter_clips(source, **settings))


def iter_clips(
    source: Source,
    *,
    depth_source: Source | None = None,
    depth_unit: str = "mm",
    seconds: float = 2.0,
    short_side: int = 128,
    fps: float = 12.0,
    hold: float = math.inf,
    modalities: Collection[str] = tuple(MODALITIES),
    estimator: Estimator | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[RawClip]:
    """Yields the consecutive clips of a video, holding one in memory at a time.

    A video shorter than `seconds` is one clip of its own length; the last piece of a longer one, or before a gap, is
    kept if it is at least half as long as the others. The frame rate is the source's, divided by a whole number to
    `fps` or below; pictures are never enlarged.

    Args:
        source: path or bytes of the video.
        depth_source: 16-bit grey video of a depth sensor on the same clock.
        depth_unit: what one step of it means: mm, cm or m.
        seconds: length of a clip.
        short_side: pixels of the shorter side.
        fps: highest frame rate.
        hold: seconds for which a picture counts at most; what is longer is a gap, which is in no clip. With a depth
            sensor's stream, which is read on without gaps: infinite.
        modalities: those wanted; a clip gets those of them that it has.
        estimator: makes depth where there is no sensor's.
        limits: bounds of what is read.

    Raises:
        UserError: no pictures, not decodable, beyond the limits.
    """
    size = partial(storage_size, short_side=short_side)
    frames = Frames(source, highest=fps, size=size, hold=hold, limits=limits)
    length = max(1, round(seconds * frames.rate))
    sound: Sound | None = None
    depths: Iterator[NDArray[np.uint16]] | None = None
    for first, rgb in frames.runs(length):
        if first and 2 * len(rgb) < length:
            continue
        clip = RawClip(fps=frames.rate, start=first / frames.rate)
        if "rgb" in modalities:
            clip.streams["rgb"] = rgb
        if "flow" in modalities and (flow := clip_flow(rgb, frames.rate)) is not None:
            clip.streams["flow"] = flow
        if "audio" in modalities:
            sound = sound or Sound(source, frames.start, limits)
            samples = sound.read(clip.start, clip.start + len(rgb) / frames.rate)
            if samples is not None:
                clip.streams["audio"] = samples
        if "depth" in modalities and depth_source is not None:
            if depths is None:
                depths = iter(_sensor(depth_source, frames.rate, (rgb.shape[2], rgb.shape[1]), limits))
            measured = _sensor_depth(depths, rgb.shape)
            if measured.any():
                clip.streams["depth"] = to_millimetres(measured, depth_unit, name_of(depth_source))
                clip.depth_kind = "sensor"
        elif "depth" in modalities and estimator is not None:
            clip.streams["depth"], clip.depth_kind = estimate(estimator, rgb), "estimated"
        yield clip


def _sensor(source: Source, rate: float, size: tuple[int, int], limits: Limits) -> Frames:
    """Returns the depth stream at the times and in the size of the colour pictures."""
    return Frames(source, rate=rate, size=lambda width, height: size, depth=True, limits=limits)


def _sensor_depth(depths: Iterator[NDArray[np.uint16]], shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Returns the next F depth pictures; zeros, no measurement, after the stream's end."""
    measured = np.zeros(shape[:3], np.uint16)
    for number, picture in enumerate(islice(depths, shape[0])):
        measured[number] = picture
    return measured
