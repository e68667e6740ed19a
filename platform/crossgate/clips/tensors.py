"""A clip as tensors: the same function for members of a shard and for a video that was just extracted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossgate.clips.augment import View, draw_view
from crossgate.clips.codec import CODECS, MEMBER_LIMITS, FrameCodec
from crossgate.clips.extract import RawClip
from crossgate.clips.flow import pair_flow
from crossgate.clips.media import SAMPLE_RATE, Frames, Sound, divided_rate, name_of, probe, storage_size
from crossgate.clips.spectrogram import FLOOR, HOP, log_mel
from crossgate.config import AugmentConfig, ClipConfig
from crossgate.errors import UserError

Listening = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""``(samples,)`` of a clip's sound -> as many others, before its spectrogram is taken."""
STORED_FPS = 12.0
"""Highest frame rate of a plain video's frames, as `pack` stores them."""
_MAX_FRAMES = 100_000


class _Clip(Protocol):
    """What `clip_tensors` asks of a clip, wherever it comes from."""

    frames: int
    fps: float

    def has(self, modality: str) -> bool: ...

    def pictures(self, modality: str, chosen: NDArray[np.int64]) -> Iterator[NDArray[Any]]: ...

    def sound(self, begin: float, end: float) -> NDArray[np.float32] | None: ...


def clip_tensors(
    source: RawClip | Mapping[str, bytes],
    clip: ClipConfig,
    augment: AugmentConfig | None = None,
    seed: int = 0,
    *,
    heard: Listening | None = None,
) -> dict[str, Tensor]:
    """Returns tensors ``(T, C, H, W)`` of exactly `ClipConfig.shape`, of the modalities that the clip has.

    rgb is uint8, the others float32 in the units of `modality`. T frames are drawn from equal segments of a window
    of `clip.seconds` (the whole clip if it is shorter): at random places with `augment`, else their middles. One
    square region is cut from all pictures. Flow is given in short sides of that region. The spectrogram covers the
    middle of the window, `clip.audio_steps` hops long; after the end of the sound it holds the value of silence.
    Memory is channels-last: ``(T, H, W, C)`` underneath.

    Args:
        source: a raw clip, or the members of a clip in a shard (suffix -> bytes, with ``json``); of a shard that others
            wrote, ``mp4``.
        clip: what is wanted.
        augment: None for evaluation.
        seed: decides the augmentation; see `augment.draw_view`.
        heard: changes the sound's samples before the spectrogram is taken (None: they stay).

    Raises:
        UserError: a member is damaged, missing, or larger than allowed.
    """
    found = _opened(source, clip)
    view = draw_view(clip.frames, augment, seed)
    window = clip.seconds * found.fps
    chosen = view.frames(found.frames, window)
    tensors: dict[str, Tensor] = {}
    for name in clip.modalities:
        if not found.has(name):
            continue
        if name == "audio":
            begin = view.start * max(0.0, found.frames - window) / found.fps
            spectrogram = _spectrogram(found, clip, view, begin, heard)
            if spectrogram is not None:
                tensors[name] = torch.from_numpy(spectrogram)[None, None]
        else:
            stack = _STACKS[name](found.pictures(name, chosen), clip, view)
            tensors[name] = torch.from_numpy(stack).permute(0, 3, 1, 2)
    return tensors


# ---- pictures --------------------------------------------------------------------------------------------------


def _rgb(pictures: Iterable[NDArray[np.uint8]], clip: ClipConfig, view: View) -> NDArray[np.uint8]:
    stack = _cut(pictures, np.empty((clip.frames, clip.size, clip.size, 3), np.uint8), view, cv2.INTER_LINEAR)
    if view.recoloured:
        flat = stack.reshape(-1, clip.size, 3)
        cv2.LUT(flat, view.colours()[None], dst=flat)
    return stack


def _flow(pictures: Iterable[NDArray[np.float32]], clip: ClipConfig, view: View) -> NDArray[np.float32]:
    stack = _cut(pictures, np.empty((clip.frames, clip.size, clip.size, 2), np.float32), view, cv2.INTER_LINEAR)
    scale = np.float32(1 / view.side)  # a narrower view of the same motion crosses it sooner
    if scale != 1:
        stack *= scale
    if view.flip:
        np.negative(stack[..., 0], out=stack[..., 0])
    return stack


def _depth(pictures: Iterable[NDArray[np.uint16]], clip: ClipConfig, view: View) -> NDArray[np.float32]:
    # The nearest pixel: a mean of a distance and of a hole would be a distance that nobody measured.
    stack = _cut(pictures, np.empty((clip.frames, clip.size, clip.size), np.uint16), view, cv2.INTER_NEAREST_EXACT)
    return (stack * np.float32(0.001))[..., None]


_STACKS: dict[str, Callable[..., NDArray[Any]]] = {"rgb": _rgb, "flow": _flow, "depth": _depth}


def _cut(pictures: Iterable[NDArray[Any]], out: NDArray[Any], view: View, interpolation: int) -> NDArray[Any]:
    """Fills `out` ``(T, S, S[, C])`` with the view's region of each picture, scaled, without a copy in between."""
    size = out.shape[1:3]
    scratch = np.empty_like(out[0]) if view.flip else None
    filled = 0
    for number, picture in enumerate(pictures):
        top, bottom, left, right = view.crop(*picture.shape[:2])
        region = picture[top:bottom, left:right]
        shrinks = region.shape[0] > 1.5 * size[0] and interpolation == cv2.INTER_LINEAR
        into = out[number] if scratch is None else scratch
        cv2.resize(region, size, dst=into, interpolation=cv2.INTER_AREA if shrinks else interpolation)
        if scratch is not None:
            cv2.flip(scratch, 1, dst=out[number])
        filled = number + 1
    if filled != len(out):
        raise UserError(f"{filled} of {len(out)} frames can be decoded", cure="pack the clip anew")
    return out


# ---- sound -----------------------------------------------------------------------------------------------------


def _spectrogram(
    found: _Clip, clip: ClipConfig, view: View, begin: float, heard: Listening | None
) -> NDArray[np.float32] | None:
    """Returns ``(mels, steps)`` around the middle of the window; None where there is no sound."""
    window = min(clip.seconds, found.frames / found.fps)
    span = clip.audio_steps * HOP / SAMPLE_RATE
    begin += max(0.0, window - span) / 2
    samples = found.sound(begin, begin + span)
    if samples is None:
        return None
    if heard is not None:
        samples = heard(samples)
    if view.loudness != 1.0:
        samples = samples * np.float32(view.loudness)
    spectrogram = log_mel(samples, clip.mels, clip.audio_steps)
    for axis, (first, length) in enumerate(view.masks):
        size = spectrogram.shape[axis]
        masked = slice(round(first * size), round((first + length) * size))
        spectrogram[(masked, slice(None)) if axis == 0 else (slice(None), masked)] = FLOOR
    return spectrogram


# ---- where a clip comes from -----------------------------------------------------------------------------------


def _opened(source: RawClip | Mapping[str, bytes], clip: ClipConfig) -> _Clip:
    if isinstance(source, RawClip):
        return _Raw(source)
    if "mp4" in source and CODECS["rgb"].suffix not in source:
        return _Plain(source["mp4"], clip)
    return _Packed(source)


class _Raw:
    """A clip in memory."""

    def __init__(self, raw: RawClip) -> None:
        self.raw, self.frames, self.fps = raw, raw.frames, raw.fps

    def has(self, modality: str) -> bool:
        return modality in self.raw.streams

    def pictures(self, modality: str, chosen: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        stream = self.raw.streams[modality]
        if stream.dtype == np.float16:  # OpenCV has no arithmetic for it
            return (stream[number].astype(np.float32) for number in chosen)
        return (stream[number] for number in chosen)

    def sound(self, begin: float, end: float) -> NDArray[np.float32] | None:
        return self.raw.streams["audio"][round(begin * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


class _Packed:
    """Members of a shard that `pack` wrote."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self.members = members
        try:
            record = json.loads(members["json"])
            self.frames, self.fps = int(record["frames"]), float(record["fps"])
        except (KeyError, TypeError, ValueError):
            raise UserError("the clip has no usable json member", expected="frames and fps in it") from None
        if not (0 < self.frames <= _MAX_FRAMES and 0.01 <= self.fps <= 1000):
            raise UserError(f"the clip claims {self.frames} frames at {self.fps} a second")

    def has(self, modality: str) -> bool:
        return CODECS[modality].suffix in self.members

    def pictures(self, modality: str, chosen: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        codec = CODECS[modality]
        assert isinstance(codec, FrameCodec)
        return codec.pictures(self.members[codec.suffix], chosen)

    def sound(self, begin: float, end: float) -> NDArray[np.float32] | None:
        samples = CODECS["audio"].decode(self.members[CODECS["audio"].suffix])
        return samples[round(begin * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


class _Plain:
    """A video as others put it into shards: flow is computed here, between the frames that `pack` would store."""

    def __init__(self, data: bytes, clip: ClipConfig) -> None:
        self.data = data
        info = probe(data, MEMBER_LIMITS)
        if not info.width or info.seconds <= 0:
            raise UserError("a video without pictures or duration", where=name_of(data))
        self.fps = divided_rate(info.fps, STORED_FPS)
        self.frames = max(1, round(info.seconds * self.fps))
        self._there = {"rgb"} | ({"flow"} if self.frames > 1 else set()) | ({"audio"} if info.sound else set())
        self._with_flow = "flow" in clip.modalities and self.frames > 1
        self._short_side = max(128, clip.size)
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def has(self, modality: str) -> bool:
        return modality in self._there

    def pictures(self, modality: str, chosen: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        # Flow of the last frame is that of the one before, as in `flow.clip_flow`.
        firsts = [min(number, self.frames - 2) for number in chosen.tolist()] if self._with_flow else []
        self._keep({*chosen.tolist(), *firsts, *(number + 1 for number in firsts)})
        if modality == "rgb":
            return (self._kept[number] for number in chosen.tolist())
        return (pair_flow(self._kept[number], self._kept[number + 1], 1 / self.fps) for number in firsts)

    def _keep(self, wanted: set[int]) -> None:
        """Decodes the wanted frames; where the video ends before its header says so, its last one stands in."""
        if wanted <= self._kept.keys():
            return
        size = partial(storage_size, short_side=self._short_side)
        frames = Frames(self.data, rate=self.fps, size=size, limits=MEMBER_LIMITS)
        last = None
        for number, last in frames.pictures(wanted):
            self._kept[number] = last
        if last is None:
            raise UserError("no frame can be decoded", where=name_of(self.data))
        self._kept |= {number: last for number in wanted - self._kept.keys()}

    def sound(self, begin: float, end: float) -> NDArray[np.float32] | None:
        return Sound(self.data, limits=MEMBER_LIMITS).read(begin, end)
