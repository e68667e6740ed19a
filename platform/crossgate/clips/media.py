"""Video and sound files: bounded opening, frames on a regular grid of times, chosen frames of one stream, sound.

Whatever is wrong with a file ends in one `UserError` that names it. Nothing is allocated before the file's bytes,
picture size and duration are within `Limits`; playlists and other formats that open further files are refused.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import av.error
import cv2
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from crossgate.clips.live import CHECK_STREAM, Live
from crossgate.errors import UserError

# One clip is one core's work: processes run side by side, and OpenCV's threads would fight over their cores.
cv2.setNumThreads(1)

SAMPLE_RATE = 16_000
SILENCE = 1e-4
"""Peak below which a track is digital silence: codecs turn exact zeros into a few millionths."""

Source = str | Path | bytes | Live

_MOST_ASPECT = 8  # pictures are shrunk by their shorter side, which bounds the longer one by this alone
_SOUND_GAP_S = 2.0  # tracks drift and are torn by less, which is no gap
_FORMATS = "mov,matroska,webm,avi,mpeg,mpegts,ogg,flac,wav,mp3,aac,flv,asf,mjpeg,h264,hevc,ivf,gif,yuv4mpegpipe"


@dataclass(frozen=True)
class Limits:
    """Bounds of what is read from one file.

    Attributes:
        bytes: size of the file.
        pixels: width times height of a frame, declared or decoded.
        seconds: duration, declared or decoded.
        decoded: pixels of all frames together that are decoded of one stream.
    """

    bytes: int = 8 << 30
    pixels: int = 8192 * 4320
    seconds: float = 6 * 3600.0
    decoded: float = math.inf


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class MediaInfo:
    """What a file's header says.

    Attributes:
        width, height: of the upright picture with square pixels; 0 without pictures.
        fps: nominal frame rate; 0 without pictures.
        seconds: declared duration; 0 where the header has none.
        sound: whether there is a sound track (which may be silent).
    """

    width: int
    height: int
    fps: float
    seconds: float
    sound: bool


def name_of(source: Source) -> str:
    """Returns the name of a source for messages."""
    if isinstance(source, Live):
        return source.name
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)


@contextmanager
def open_media(
    source: Source, limits: Limits = DEFAULT_LIMITS, container_format: str | None = None
) -> Iterator[InputContainer]:
    """Opens a path or the bytes of a file; decoding errors inside the block become `UserError`.

    Args:
        source: path or bytes; a live stream is open already, and stays so.
        limits: what is refused.
        container_format: ffmpeg's name of the only format that will do; None: any harmless one.

    Raises:
        UserError: missing, unreadable, not a media file, or beyond the limits.
    """
    where = name_of(source)
    if isinstance(source, Live):
        with decoding(where, CHECK_STREAM):
            yield cast(InputContainer, source)
        return
    file: io.BytesIO | str
    if isinstance(source, bytes):
        size, file = len(source), io.BytesIO(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise UserError("no such file", where=where, cure="check the path")
        # With the scheme, ffmpeg reads no name as a protocol of its own ("concat:", "pipe:").
        size, file = path.stat().st_size, f"file:{path}"
    if size > limits.bytes:
        raise UserError(f"file of {size} bytes", where=where, expected=f"at most {limits.bytes}")
    # `max_pixels` also binds the decoders that look into the streams while the file is being opened.
    options = {"format_whitelist": _FORMATS, "max_pixels": str(limits.pixels)}
    with (
        decoding(where),
        av.open(file, format=container_format, metadata_errors="replace", options=options) as container,
    ):
        assert isinstance(container, InputContainer)
        seconds = (container.duration or 0) / av.time_base
        if seconds > limits.seconds:
            raise UserError(f"lasts {seconds:.0f} s", where=where, expected=f"at most {limits.seconds:.0f} s")
        for stream in container.streams.video:
            if stream.codec_context is not None:  # else no decoder knows it, and it has no size either
                check_pixels(stream.width, stream.height, limits, where)
                stream.codec_context.options = {"max_pixels": str(limits.pixels)}
        yield container


@contextmanager
def decoding(where: str, cure: str = "replace or repair the file") -> Iterator[None]:
    """Turns what FFmpeg says of a source into a `UserError`."""
    try:
        yield
    except av.error.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"not decodable ({reason})", where=where, cure=cure) from None
    except (OSError, EOFError) as error:
        raise UserError(f"not readable ({error})", where=where) from None


def check_pixels(width: int, height: int, limits: Limits, where: str) -> None:
    """Raises `UserError` where a picture is larger than the limits allow."""
    if width * height > limits.pixels:
        raise UserError(f"pictures of {width} x {height}", where=where, expected=f"at most {limits.pixels} pixels")


def video_stream(container: InputContainer, where: str) -> VideoStream:
    """Returns the first real video stream (cover art is none), set to decode in this thread.

    Raises:
        UserError: there is none.
    """
    for stream in container.streams.video:
        if stream.codec_context is not None and "attached_pic" not in str(stream.disposition):
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            return stream
    raise UserError("no pictures in the file", where=where, expected="a video", cure="remove it from the manifest")


def probe(source: Source, limits: Limits = DEFAULT_LIMITS) -> MediaInfo:
    """Returns what the header of a file says, without decoding it."""
    with open_media(source, limits) as container:
        sound = bool(container.streams.audio)
        seconds = (container.duration or 0) / av.time_base
        if not container.streams.video:
            return MediaInfo(0, 0, 0.0, seconds, sound)
        stream = video_stream(container, name_of(source))
        width, height = upright(stream.width, stream.height, float(stream.sample_aspect_ratio or 1), 0)
        return MediaInfo(width, height, source_rate(stream), seconds, sound)


def upright(width: int, height: int, aspect: float, rotation: int) -> tuple[int, int]:
    """Returns ``(width, height)`` with square pixels, after a rotation in degrees.

    Args:
        width, height: in pixels as they are stored.
        aspect: width of a stored pixel over its height; unbelievable ones count as 1.
        rotation: in degrees.
    """
    width = round(width * aspect) if 0.1 < aspect < 10 else width
    return (height, width) if rotation % 180 else (width, height)


def source_rate(stream: VideoStream) -> float:
    """Returns the nominal frame rate, 25 where the header has no believable one."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate is not None and 0.1 <= float(rate) <= 1000:
            return float(rate)
    return 25.0


def divided_rate(rate: float, highest: float) -> float:
    """Returns the rate divided by the smallest whole number that brings it to `highest` or below."""
    return rate / max(1, math.ceil(rate / highest - 1e-3))


def check_aspect(width: int, height: int, where: str) -> None:
    """Raises `UserError` where an upright picture is a strip."""
    if max(width, height) > _MOST_ASPECT * min(width, height):
        expected = f"sides of at most {_MOST_ASPECT} to 1"
        raise UserError(f"pictures of {width} x {height}", where=where, expected=expected, cure="crop them")


def storage_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Returns the even ``(width, height)`` whose shorter side is `short_side`; never larger than the source."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


class Frames:
    """Frames of a video at the times ``k / rate``: at each, the latest frame that has begun (sample and hold).

    Args:
        source: path or bytes.
        rate: frames a second; None: `divided_rate` of the source's by `highest`.
        size: function of the upright ``(width, height)`` that returns the wanted one.
        depth: the stream is 16-bit grey and is returned as such, resized without mixing neighbours.
        hold: seconds for which a frame counts at most, one step of the rate at least; then nothing is due until the
            next one.
    """

    def __init__(
        self,
        source: Source,
        *,
        rate: float | None = None,
        highest: float = 12.0,
        size: Callable[[int, int], tuple[int, int]],
        depth: bool = False,
        hold: float = math.inf,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.source, self.size, self.depth, self.limits = source, size, depth, limits
        self.where = name_of(source)
        with open_media(source, limits) as container:
            stream = video_stream(container, self.where)
            if depth and "gray16" not in (stream.pix_fmt or ""):
                raise UserError(f"depth stream is {stream.pix_fmt}", where=self.where, expected="16-bit grey (gray16)")
            self.source_rate = source_rate(stream)
            self._aspect = float(stream.sample_aspect_ratio or 1)
        self.rate = rate or divided_rate(self.source_rate, highest)
        self.hold = max(hold, 1 / self.rate)
        self.start: float = 0.0
        """Time of the first frame on the file's clock, known once iteration has begun."""
        self._slack = 0.25 / self.source_rate  # containers round times, Matroska to milliseconds
        self._reformatter = VideoReformatter()

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yields ``(H, W, 3)`` uint8, or ``(H, W)`` uint16 for depth."""
        return (picture for _, picture in self.pictures())

    def pictures(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields ``(k, picture)``, of the wanted numbers only if given; decodes nothing after the last of them."""
        count, last = (0, math.inf) if wanted is None else (min(wanted), max(wanted))
        held: av.VideoFrame | None = None
        until = math.inf
        for time, frame in self._timed(count):
            if held is not None:
                for number in self._due(count, min(time, until)):
                    count = number + 1
                    if wanted is None or number in wanted:
                        yield number, self._picture(held)
                if time > until:
                    count = max(count, math.ceil((time - self._slack) * self.rate))
                if count > last:
                    return
            held, until = frame, time + self.hold
            end = time + 2 * self._slack
        if held is None:
            raise UserError("no frame can be decoded", where=self.where, cure="replace or repair the file")
        for number in self._due(count, end):
            if wanted is None or number in wanted:
                yield number, self._picture(held)

    def runs(self, length: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yields the number of the first of `length` consecutive pictures, and them: fewer before a gap and at the end.

        Args:
            length: of a run, in pictures.
        """
        first, run = 0, list[NDArray[Any]]()
        for number, picture in self.pictures():
            if run and number != first + len(run):
                yield first, np.stack(run)
                run = []
            if not run:
                first = number
            run.append(picture)
            if len(run) == length:
                yield first, np.stack(run)
                run = []
        if run:
            yield first, np.stack(run)

    def _due(self, count: int, time: float) -> Iterator[int]:
        """Yields the numbers from `count` on whose time has come before a frame of the given time replaces theirs."""
        while count / self.rate + self._slack < time:
            yield count
            count += 1

    def _timed(self, first: int) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yields ``(seconds from the first frame, frame)`` from the key frame before the one numbered `first` on."""
        with open_media(self.source, self.limits) as container:
            stream = video_stream(container, self.where)
            tick = float(stream.time_base or 0)
            start = stream.start_time * tick if stream.start_time is not None and tick else None
            if first > self.rate and start is not None:  # less than a second is decoded sooner than sought
                container.seek(int((start + first / self.rate) / tick), stream=stream)
            time = -1 / self.source_rate
            for frame in self._decoded(container, stream):
                if start is None:
                    start = frame.time or 0.0
                self.start = start
                time = frame.time - start if frame.time is not None else time + 1 / self.source_rate
                if time > self.limits.seconds:
                    bound = f"at most {self.limits.seconds:.0f} s"
                    raise UserError(f"lasts {time:.0f} s", where=self.where, expected=bound)
                yield time, frame

    def _decoded(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        """Yields all frames that are decoded within the limits."""
        if math.isinf(self.limits.decoded):
            packets: Iterator[Iterable[av.VideoFrame]] = ([frame] for frame in container.decode(stream))
        else:
            # By packets, for a file may tell the decoder to throw pictures away, and they have cost as much.
            packets = (packet.decode() for packet in container.demux(stream))
        total = 0
        for frames in packets:
            for frame in frames:
                check_pixels(frame.width, frame.height, self.limits, self.where)
                yield frame
            total += stream.width * stream.height
            if total > self.limits.decoded:
                bound = f"at most {self.limits.decoded / 1e9:g} gigapixels to decode"
                raise UserError("too many pictures", where=self.where, expected=bound, cure="cut it into parts")

    def _picture(self, frame: av.VideoFrame) -> NDArray[Any]:
        if self.depth:
            grey: NDArray[np.uint16] = np.ascontiguousarray(frame.to_ndarray(format="gray16le"))
            return cv2.resize(grey, self.size(grey.shape[1], grey.shape[0]), interpolation=cv2.INTER_NEAREST_EXACT)
        turns = round(frame.rotation / 90) % 4
        shown = upright(frame.width, frame.height, self._aspect, turns * 90)
        check_aspect(*shown, self.where)
        width, height = self.size(*shown)
        if turns % 2:
            width, height = height, width
        small = self._reformatter.reformat(
            frame, width, height, format="rgb24", interpolation=Interpolation.AREA, threads=1
        )
        return np.ascontiguousarray(np.rot90(small.to_ndarray(), turns))


def chosen_frames(
    data: bytes,
    chosen: NDArray[np.integer] | None,
    pixel_format: str,
    *,
    container_format: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[NDArray[Any]]:
    """Yields the frames with the given ascending numbers (repeats allowed) of a stream that `codec` has encoded.

    Where every packet is a picture of its own, unwanted ones are not even decoded; nothing is decoded after the last
    wanted one. The yielded array may be a view of the decoder's memory: use it before the next one.

    Args:
        data: the file.
        chosen: ascending frame numbers; None: all.
        pixel_format: ``rgb24``, ``gray`` (luma, values as stored) or ``gray16le``.
        container_format: as in `open_media`.
        limits: of the file; `bytes` also bounds the pixels of all yielded frames together.

    Raises:
        UserError: the stream has fewer frames, or cannot be decoded.
    """
    wanted = None if chosen is None else Counter(int(number) for number in chosen)
    left = math.inf if wanted is None else wanted.total()
    count = 0
    with open_media(data, limits, container_format) as container:
        stream = video_stream(container, name_of(data))
        reformatter = VideoReformatter()
        for number, frame in _numbered_frames(container, stream, wanted):
            repeats = 1 if wanted is None else wanted[number]
            if not repeats:
                continue
            count += 1
            check_pixels(frame.width, frame.height, limits, name_of(data))
            if count * frame.width * frame.height > limits.bytes:
                raise UserError("too many pictures", where=name_of(data), expected=f"at most {limits.bytes} pixels")
            if frame.format.name != pixel_format and not (pixel_format == "gray" and frame.format.name in _LUMA):
                frame = reformatter.reformat(frame, format=pixel_format, threads=1)
            picture = _view(frame, pixel_format)
            for _ in range(repeats):
                yield picture
            left -= repeats
            if left <= 0:
                return
    if wanted is not None or not count:
        raise UserError("frames are missing", where=name_of(data), cure="pack the clip anew")


def _numbered_frames(
    container: InputContainer, stream: VideoStream, wanted: Container[int] | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields ``(number, frame)``, skipping unwanted packets where every packet is a picture of its own."""
    if wanted is not None and stream.codec_context.name in _INTRA:
        for number, packet in enumerate(container.demux(stream)):
            if number in wanted:
                for frame in stream.codec_context.decode(packet):
                    yield number, frame
    else:
        yield from enumerate(container.decode(stream))


_INTRA = {"mjpeg", "png"}
_LUMA = {"yuv420p", "yuvj420p"}  # their first plane is what `codec.encode_frames` was given


def _view(frame: av.VideoFrame, pixel_format: str) -> NDArray[Any]:
    """Returns the frame's only plane as an array over its own memory."""
    plane = frame.planes[0]
    dtype = np.dtype("<u2" if pixel_format == "gray16le" else "u1")
    channels = 3 if pixel_format == "rgb24" else 1
    row = plane.line_size // dtype.itemsize
    flat = np.frombuffer(memoryview(plane), dtype).reshape(frame.height, row)[:, : frame.width * channels]
    return flat.reshape(frame.height, frame.width, 3) if channels == 3 else flat


class Sound:
    """The first sound track of a file as 16 kHz mono float32, read forwards in pieces.

    Args:
        source: path or bytes.
        start: time on the file's clock that counts as 0, that of the first frame.
    """

    def __init__(self, source: Source, start: float = 0.0, limits: Limits = DEFAULT_LIMITS) -> None:
        self._pieces = _sound_pieces(source, start, limits)
        self._held = np.zeros(0, np.float32)
        self._first = 0  # sample number of _held[0]

    def read(self, begin: float, end: float) -> NDArray[np.float32] | None:
        """Returns the samples from `begin` to `end` seconds as far as they exist.

        None where the track is missing, over, or digital silence: silence that no microphone has heard is absence.
        """
        first, last = round(begin * SAMPLE_RATE), round(end * SAMPLE_RATE)
        while self._first + len(self._held) < last:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._held = np.concatenate((self._held, piece))
            self._drop(first)
        self._drop(first)
        samples = self._held[: max(0, last - self._first)].copy()
        if not len(samples) or float(np.abs(samples).max()) < SILENCE:
            return None
        return samples

    def _drop(self, first: int) -> None:
        behind = min(len(self._held), max(0, first - self._first))
        self._held, self._first = self._held[behind:], self._first + behind


def _sound_pieces(source: Source, start: float, limits: Limits) -> Iterator[NDArray[Any]]:
    with open_media(source, limits) as container:
        tracks = [stream for stream in container.streams.audio if stream.codec_context is not None]
        if not tracks:
            return
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        behind: int | None = None  # samples before the first picture, still to be dropped
        total = 0
        due = math.inf
        for frame in container.decode(tracks[0]):
            if behind is None:
                behind = round((start - (frame.time or 0.0)) * SAMPLE_RATE)
                if -60 * SAMPLE_RATE < behind < 0:
                    yield np.zeros(-behind, np.float32)
                behind = max(0, behind)
            if frame.time is not None:
                if frame.time > due + _SOUND_GAP_S:
                    silent = round((frame.time - due) * SAMPLE_RATE)
                    cut = min(behind, silent)
                    behind -= cut
                    yield from _silence(silent - cut)
                due = frame.time + frame.samples / frame.sample_rate
            for small in resampler.resample(frame):
                samples = small.to_ndarray().reshape(-1)
                cut = min(behind, len(samples))
                behind -= cut
                total += len(samples)
                if total > limits.seconds * SAMPLE_RATE:
                    return
                yield samples[cut:]
        for small in resampler.resample(None):
            yield small.to_ndarray().reshape(-1)


def _silence(samples: int) -> Iterator[NDArray[Any]]:
    """Yields so many zeros, a second at a time: a gap may be a day."""
    for first in range(0, samples, SAMPLE_RATE):
        yield np.zeros(min(SAMPLE_RATE, samples - first), np.float32)
