"""A stream that comes as it happens, a camera's say: read once, over one connection, whatever is asked of it first."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import av
import av.error

SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp")
"""Of URLs that are always live."""

CHECK_STREAM = "check that it is on and can be reached, then start again"
_PROTOCOLS = (
    "http,https,tls,tcp,udp,rtp,rtsp,rtsps,rtmp,rtmps,srt,crypto"  # no file: the other side may send a playlist
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_OPEN_S, _READ_S = 15.0, 30.0
_AHEAD_S = 2.0  # decoded pictures are large: more of them are not kept for sound that does not come
_NO_PICTURE_S = 60.0
_JUMP_S, _USUAL_STEPS = 2.0, 3

log = logging.getLogger("crossgate.clips")


class Live:
    """Stands for PyAV's open container where `media` reads a file, with pictures and sound asked for in any order.

    A packet that cannot be decoded is left out. Sound that falls more than two seconds behind the pictures counts as
    over. Where a clock steps back, or ahead by more than two seconds and three usual steps, time goes on as if it had
    not.

    Args:
        url: of any scheme of `SCHEMES`, or http(s).
        pixels: width times height of a picture at most.
        sound: whether it will be asked for.

    Raises:
        av.error.FFmpegError: it cannot be opened.
    """

    duration = None

    def __init__(self, url: str, *, pixels: int, sound: bool) -> None:
        self.name = shown(url)
        options = {"protocol_whitelist": _PROTOCOLS, "max_pixels": str(pixels), "rtsp_transport": "tcp"}
        self._container = av.open(url, metadata_errors="replace", options=options, timeout=(_OPEN_S, _READ_S))
        self.streams = self._container.streams
        chosen = [*self.streams.video[:1], *(self.streams.audio[:1] if sound else ())]
        self._packets = self._container.demux(*chosen)
        self._waiting: dict[int, deque[Any]] = {stream.index: deque() for stream in chosen}
        self._clocks = {stream.index: _Clock(f"{self.name}, {stream.type}", _declared(stream)) for stream in chosen}

    def decode(self, stream: Any) -> Iterator[Any]:
        """Yields one stream's frames; those of the other that come in between wait for their turn."""
        own = self._waiting[stream.index]
        while own or self._pull(stream):
            if own:
                yield own.popleft()

    def close(self) -> None:
        """Ends the connection."""
        self._container.close()

    def _pull(self, stream: Any) -> bool:
        """Reads a packet; says whether to go on asking for frames of this stream."""
        if any(self._waits(index) for index in self._waiting if index != stream.index):
            if stream.type == "video":
                raise OSError(f"no picture for {_NO_PICTURE_S:.0f} s")
            return False
        packet = next(self._packets, None)
        if packet is None:
            return False
        index = packet.stream.index
        with suppress(av.error.InvalidDataError):
            self._waiting[index].extend(map(self._clocks[index].smoothed, packet.decode()))
        return True

    def _waits(self, index: int) -> bool:
        """Whether more frames of a stream have come than are kept."""
        waiting = self._waiting[index]
        if len(waiting) < 2 or waiting[0].time is None or waiting[-1].time is None:
            return False
        most = _AHEAD_S if self.streams[index].type == "video" else _NO_PICTURE_S
        return bool(waiting[-1].time - waiting[0].time > most)


class _Clock:
    """Takes the jumps out of the times of one stream's frames: a network's outage, a camera that sets its clock.

    A step that is long but like the one before it is no jump: so slow a camera may have declared another rate.

    Args:
        name: for the log.
        step: usual one, in the stream's ticks; 0 where it is unknown.
    """

    def __init__(self, name: str, step: int) -> None:
        self._name = name
        self._last: int | None = None  # in the stream's ticks, as given
        self._step = step
        self._before = 0  # the last step as given, a jump or not
        self._taken = 0

    def smoothed(self, frame: Any) -> Any:
        """Returns the frame, where time jumps a usual step after the one before."""
        if frame.pts is None:
            return frame
        given = frame.pts
        if self._last is not None:
            step = given - self._last
            longest = max(_JUMP_S / frame.time_base, _USUAL_STEPS * max(self._step, self._before))
            if 0 <= step <= longest:
                self._step = step
            else:
                log.warning(
                    "%s: the clock jumps by %+.1f s; time goes on from there", self._name, step * frame.time_base
                )
                self._taken += step - self._step
            self._before = step
        self._last = given
        frame.pts = given - self._taken
        return frame


def _declared(stream: Any) -> int:
    """Returns the ticks from frame to frame by the rate that a stream declares, 0 where it declares none."""
    rate = (stream.average_rate or stream.guessed_rate) if stream.type == "video" else None
    return round(1 / (rate * stream.time_base)) if rate and stream.time_base else 0


def shown(url: str) -> str:
    """Returns a URL as it may be shown: without user name, password and query, any of which may be a secret."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # no number: the beginning of a password with an unquoted slash
    except ValueError:
        return f"{url.partition('://')[0]}://***"
    host = parts.netloc.rsplit("@", 1)[-1]
    return f"{parts.scheme}://{host}{parts.path}"


def without_secrets(said: str) -> str:
    """Returns what a library said, each URL in it as it may be shown."""
    return _URL.sub(lambda found: shown(found[0]), said)
