"""How each modality lies in a shard. docs/storage.md has the measurements behind each choice.

A fifth modality is one entry in `modality.MODALITIES` and one in `CODECS`.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from crossgate.clips.media import SAMPLE_RATE, Limits, chosen_frames, name_of, open_media
from crossgate.errors import UserError

MEMBER_LIMITS = Limits(bytes=256 << 20, pixels=4096 * 2304, seconds=600.0)
"""Bounds of one member of a shard."""


def encode_frames(
    frames: NDArray[Any], fps: float, *, codec: str, pixel_format: str, options: dict[str, str], container: str
) -> bytes:
    """Returns the bytes of a video file; the same frames always give the same bytes.

    Args:
        frames: ``(F, H, W, 3)`` uint8 RGB, ``(F, H, W)`` uint8 or ``(F, H, W)`` uint16. Grey 8-bit values become
            the luma of a colour format as they are, so that no conversion of ranges touches them.
        fps: frames a second.
        codec, pixel_format, options, container: in ffmpeg's words.
    """
    rate = Fraction(fps).limit_denominator(100_000)
    file = io.BytesIO()
    with av.open(file, "w", format=container, container_options={"fflags": "bitexact"}) as target:
        stream: Any = target.add_stream(codec, rate=rate, options={"flags": "bitexact", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(frames):
            frame = _frame(np.ascontiguousarray(picture), pixel_format)
            frame.pts, frame.time_base = number, 1 / rate
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return file.getvalue()


def _frame(picture: NDArray[Any], pixel_format: str) -> av.VideoFrame:
    if picture.ndim == 3:
        return av.VideoFrame.from_ndarray(picture, format="rgb24")
    if picture.dtype == np.uint16:
        return av.VideoFrame.from_ndarray(picture, format="gray16le")
    if pixel_format == "gray":
        return av.VideoFrame.from_ndarray(picture, format="gray")
    height, width = picture.shape
    planes = np.concatenate((picture, np.full((height // 2, width), 128, np.uint8)))  # even sides: 4:2:0
    return av.VideoFrame.from_ndarray(planes, format=pixel_format)


def encode_sound(
    samples: NDArray[np.float32], *, codec: str, sample_format: str, options: dict[str, str], container: str
) -> bytes:
    """Returns the bytes of a 16 kHz mono sound file, with samples rounded to 16 bits."""
    whole = np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
    file = io.BytesIO()
    with av.open(file, "w", format=container, container_options={"fflags": "bitexact"}) as target:
        stream: Any = target.add_stream(
            codec, rate=SAMPLE_RATE, layout="mono", options={"flags": "bitexact", **options}
        )
        resampler = av.AudioResampler(format=sample_format, layout="mono", rate=SAMPLE_RATE)
        frame = av.AudioFrame.from_ndarray(whole[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        for small in [*resampler.resample(frame), *resampler.resample(None)]:
            target.mux(stream.encode(small))
        target.mux(stream.encode(None))
    return file.getvalue()


def decode_sound(data: bytes, container_format: str | None = None) -> NDArray[np.float32]:
    """Returns the samples ``(samples,)`` of a 16 kHz mono file.

    Raises:
        UserError: damaged, or larger than `MEMBER_LIMITS`.
    """
    pieces: list[NDArray[Any]] = []
    left = int(MEMBER_LIMITS.seconds * SAMPLE_RATE)
    with open_media(data, MEMBER_LIMITS, container_format) as container:
        for frame in container.decode(audio=0):
            left -= frame.samples * frame.layout.nb_channels  # the header may not say how much there is
            if left < 0:
                bound = f"at most {MEMBER_LIMITS.seconds:.0f} s"
                raise UserError("too much sound", where=name_of(data), expected=bound, cure="pack the clip anew")
            pieces.append(frame.to_ndarray().reshape(-1))
    if not pieces:
        raise UserError("no sound can be decoded", where=name_of(data), cure="pack the clip anew")
    samples = np.concatenate(pieces)
    if samples.dtype == np.int16:
        return samples.astype(np.float32) * np.float32(1 / 32768)
    return samples.astype(np.float32)


class Codec(ABC):
    """How the stream of one modality becomes a member of a shard.

    Attributes:
        suffix: of the member's name, after the clip's key and a dot. It begins with the modality.
    """

    suffix: str

    @abstractmethod
    def encode(self, stream: NDArray[Any], fps: float) -> bytes:
        """Returns the member's bytes; the same stream always gives the same bytes."""

    @abstractmethod
    def decode(self, data: bytes, chosen: NDArray[np.integer] | None = None) -> NDArray[Any]:
        """Returns the stream, or its frames with the ascending numbers `chosen`, as `extract.RawClip` has it.

        Raises:
            UserError: damaged, or larger than `MEMBER_LIMITS`.
        """


class FrameCodec(Codec):
    """A codec of pictures, which can be had one at a time."""

    @abstractmethod
    def pictures(self, data: bytes, chosen: NDArray[np.integer] | None = None) -> Iterator[NDArray[Any]]:
        """Yields the pictures of `decode` one by one; use each before the next."""

    def decode(self, data: bytes, chosen: NDArray[np.integer] | None = None) -> NDArray[Any]:
        return np.stack([picture.copy() for picture in self.pictures(data, chosen)])


class RgbCodec(FrameCodec):
    """H.264 without the tools that make decoding slow: no CABAC, no deblocking, no B frames."""

    suffix = "rgb.mp4"
    # x264's macroblock tree reads memory that it has not written: about one clip in a hundred came out otherwise.
    options = {"crf": "20", "preset": "medium", "tune": "fastdecode", "bf": "0", "x264-params": "mbtree=0"}

    def encode(self, stream: NDArray[np.uint8], fps: float) -> bytes:
        return encode_frames(
            stream, fps, codec="libx264", pixel_format="yuv420p", options=self.options, container="mp4"
        )

    def pictures(self, data: bytes, chosen: NDArray[np.integer] | None = None) -> Iterator[NDArray[np.uint8]]:
        return chosen_frames(data, chosen, "rgb24", container_format="mp4", limits=MEMBER_LIMITS)


class FlowCodec(FrameCodec):
    """Motion JPEG at half the side, u above v, in 8 bits that are finest around no motion.

    A value x becomes ``round(127 asinh(x / KNEE) / asinh(RANGE / KNEE)) + 128``.
    """

    suffix = "flow.mp4"
    RANGE = 8.0
    """Largest flow, in short sides a second."""
    KNEE = 0.05
    """Below it steps are even, above it they grow with the value."""
    options = {"qmin": "2", "qmax": "2"}

    def __init__(self) -> None:
        levels = (np.arange(256, dtype=np.float64) - 128) / 127
        self._values = (np.sinh(levels * np.arcsinh(self.RANGE / self.KNEE)) * self.KNEE).astype(np.float32)

    def encode(self, stream: NDArray[np.floating], fps: float) -> bytes:
        height, width = (max(2, round(side / 4) * 2) for side in stream.shape[1:3])
        small = np.stack(
            [cv2.resize(field, (width, height), interpolation=cv2.INTER_AREA) for field in stream.astype(np.float32)]
        )
        level = np.rint(127 * np.arcsinh(small / self.KNEE) / np.arcsinh(self.RANGE / self.KNEE))
        level = (np.clip(level, -127, 127) + 128).astype(np.uint8)
        stacked = np.concatenate((level[..., 0], level[..., 1]), axis=1)  # (F, 2H, W)
        return encode_frames(
            stacked, fps, codec="mjpeg", pixel_format="yuvj420p", options=self.options, container="mp4"
        )

    def pictures(self, data: bytes, chosen: NDArray[np.integer] | None = None) -> Iterator[NDArray[np.float32]]:
        for stacked in chosen_frames(data, chosen, "gray", container_format="mp4", limits=MEMBER_LIMITS):
            half = len(stacked) // 2
            yield self._values[np.stack((stacked[:half], stacked[half : 2 * half]), axis=-1)]


class DepthCodec(FrameCodec):
    """PNG of the logarithm of the distance in 254 steps of 1.6 %; 0 stays "no measurement"."""

    suffix = "depth.mov"
    NEAR, FAR = 250.0, 16_000.0
    """Millimetres between which the steps lie."""
    options = {"pred": "up"}

    def __init__(self) -> None:
        levels = np.concatenate(([0.0], self.NEAR * (self.FAR / self.NEAR) ** (np.arange(255) / 254)))
        self._values = np.rint(levels).astype(np.uint16)

    def encode(self, stream: NDArray[np.uint16], fps: float) -> bytes:
        ratio = np.clip(stream.astype(np.float32), self.NEAR, self.FAR) / self.NEAR
        level = 1 + np.rint(254 * np.log(ratio) / np.log(self.FAR / self.NEAR))
        level = np.where(stream == 0, 0, level).astype(np.uint8)
        return encode_frames(level, fps, codec="png", pixel_format="gray", options=self.options, container="mov")

    def pictures(self, data: bytes, chosen: NDArray[np.integer] | None = None) -> Iterator[NDArray[np.uint16]]:
        for level in chosen_frames(data, chosen, "gray", container_format="mov", limits=MEMBER_LIMITS):
            yield self._values[level]


class AudioCodec(Codec):
    """FLAC, 16 bits."""

    suffix = "audio.flac"

    def encode(self, stream: NDArray[np.float32], fps: float) -> bytes:
        return encode_sound(stream, codec="flac", sample_format="s16", options={}, container="flac")

    def decode(self, data: bytes, chosen: NDArray[np.integer] | None = None) -> NDArray[np.float32]:
        return decode_sound(data, "flac")


CODECS: dict[str, Codec] = {
    "rgb": RgbCodec(),
    "flow": FlowCodec(),
    "audio": AudioCodec(),
    "depth": DepthCodec(),
}
"""Modality -> its codec."""
