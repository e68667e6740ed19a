"""A sliding window over a long video: scores over time as they come, an alarm with hysteresis, a timeline."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.clips.extract import RawClip, iter_clips
from crossgate.clips.live import CHECK_STREAM, SCHEMES, Live, shown
from crossgate.clips.media import SAMPLE_RATE, Limits, Source, decoding
from crossgate.clips.tensors import clip_tensors
from crossgate.config import TrackingConfig
from crossgate.errors import UserError, writing
from crossgate.evaluation.timeline import Thumbnail
from crossgate.registry.predictor import Predictor
from crossgate.registry.release import fetched
from crossgate.registry.sources import Settings, is_url, pieces, resolve

_DAY = 24 * 3600.0
_HYSTERESIS = 0.7
_THUMBNAILS = 400  # kept at most; then every other one is dropped
_POINTS = 20_000  # of a timeline, which is no more pixels wide
_BOUNDS = Settings(megabytes=8 << 10)
_MOST_STRIDE = 16


@dataclass
class Alarm:
    """On from `on` upwards, off again only below `off`, so that a score on the edge does not ring and ring.

    Attributes:
        on, off: scores, `off` not above `on`.
        after: windows in a row that must reach `on`.
    """

    on: float
    off: float
    after: int = 2
    ringing: bool = False
    _reached: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.off <= self.on <= 1:
            raise UserError(f"alarm on at {self.on:g}, off at {self.off:g}", expected="0 <= off <= on <= 1")

    def hear(self, score: float) -> bool:
        """Returns whether it rings after this score."""
        self._reached = self._reached + 1 if score >= self.on else 0
        self.ringing = score >= self.off if self.ringing else self._reached >= self.after
        return self.ringing


@dataclass(frozen=True)
class Moment:
    """One window.

    Attributes:
        start_s, end_s: of the window, from the video's first frame.
        score: of the watched class.
        scores: class -> probability.
        weights: modality -> gate weight; None for a fusion without a gate.
        modalities: that the window has.
        alarm: whether it rings.
    """

    start_s: float
    end_s: float
    score: float
    scores: dict[str, float]
    weights: dict[str, float] | None
    modalities: list[str]
    alarm: bool

    def row(self) -> dict[str, Any]:
        """Returns the JSON object of the window."""
        return asdict(self)


class Watch:
    """Iterates over the moments of a video, in its order, holding two windows in memory.

    Args:
        model: ``models:/NAME@ALIAS``, or the directory of a run or model.
        video: path, http(s) or s3 URL, which is fetched whole into a temporary file, or the URL of a live stream
            (`clips.live.SCHEMES`).
        live: an http(s) URL is a live stream too.
        stride: windows begin so many to a window's length (2: each overlaps half of the one before).
        label: watched class (empty: the model's positive one).
        on: score from which the alarm rings (None: that from which the model answers with the class).
        off: score below which it stops (None: 0.7 of `on`).
        after: windows in a row that must reach `on`.
        tracking_uri: server of a registered model.

    Raises:
        UserError: no such model, class or video, or numbers out of bounds.
    """

    def __init__(
        self,
        model: str,
        video: str,
        *,
        stride: int = 2,
        label: str = "",
        on: float | None = None,
        off: float | None = None,
        after: int = 2,
        tracking_uri: str = "",
        live: bool = False,
    ) -> None:
        _check_counts(stride, after)
        with ExitStack() as opened:
            registered = model.startswith("models:/")
            folder = opened.enter_context(fetched(model, TrackingConfig(uri=tracking_uri))) if registered else model
            self._predictor = Predictor(folder)
        card = self._predictor.card
        self.label = label or card.positive
        if self.label not in card.classes:
            what = f"no class '{self.label}'" if self.label else "the model has no positive class: say which to watch"
            raise UserError(what, where="--label", expected=", ".join(card.classes))
        if on is None:
            on = min(1.0, card.threshold) if self.label == card.positive else 0.5
        self.alarm = Alarm(on, _HYSTERESIS * on if off is None else off, after)
        self._stride = stride
        self.thumbnails: list[Thumbnail] = []
        self._every = 1
        self.seconds = self.busy = 0.0
        self._limits = Limits(seconds=_DAY)
        self._name = shown(video) if is_url(video) else video
        with ExitStack() as opened:
            self._video = self._opened(video, live, opened)
            self._open = opened.pop_all()

    @property
    def speed(self) -> float:
        """Seconds of video watched in a second: real time from 1 on."""
        return self.seconds / self.busy if self.busy else 0.0

    def __iter__(self) -> Iterator[Moment]:
        try:
            yield from self._moments()
        except UserError as error:
            if error.where != str(self._video):
                raise
            raise UserError(error.what, where=self._name, expected=error.expected, cure=error.cure) from None
        finally:
            self._open.close()

    def _opened(self, video: str, live: bool, opened: ExitStack) -> Source:
        """Returns what to read: a live connection, a file, or a file that what a URL names was written to."""
        if live or video.split("://", 1)[0] in SCHEMES:
            self._limits = Limits(seconds=math.inf)
            with decoding(self._name, CHECK_STREAM):
                sound = "audio" in self._predictor.modalities
                return opened.enter_context(closing(Live(video, pixels=self._limits.pixels, sound=sound)))
        if not is_url(video):
            return resolve(video, _BOUNDS).video
        path = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="crossgate-watch-"))) / "video"
        with writing("what is fetched", path), path.open("wb") as file:
            for piece in pieces(video, _BOUNDS):
                file.write(piece)
        return path

    def _moments(self) -> Iterator[Moment]:
        parts = self._pieces()
        held: list[RawClip] = []
        count = windows = 0
        while True:
            begun = time.perf_counter()
            piece = next(parts, None)
            if piece is None:
                break
            if held and not _adjoin(held[-1], piece):
                held = []
            held = [*held, piece][-self._stride :]
            self.seconds += piece.seconds
            moment = self._moment(held) if len(held) == self._stride else None
            self._keep(piece, count)
            count += 1
            self.busy += time.perf_counter() - begun
            if moment is not None:
                windows += 1
                yield moment
        if held and not windows:  # shorter than a window
            yield self._moment(held)

    def _pieces(self) -> Iterator[RawClip]:
        """Yields the parts that windows are joined of, none of a long gap."""
        clip = self._predictor.card.clip
        return iter_clips(
            self._video,
            seconds=clip.seconds / self._stride,
            short_side=max(128, clip.size),
            hold=clip.seconds,
            modalities={*clip.modalities, "rgb"},
            limits=self._limits,
        )

    def _moment(self, parts: list[RawClip]) -> Moment:
        joined = join(parts)
        tensors = clip_tensors(joined, self._predictor.card.clip, None, 0)
        if not tensors:
            raise UserError("none of the model's modalities", expected=" or ".join(self._predictor.modalities))
        row = self._predictor.score(tensors)
        score = row["scores"][self.label]
        end = joined.start + joined.seconds
        ringing = self.alarm.hear(score)
        return Moment(joined.start, end, score, row["scores"], row["weights"], row["modalities"], ringing)

    def _keep(self, piece: RawClip, number: int) -> None:
        if number % self._every or "rgb" not in piece.streams:
            return
        self.thumbnails.append(Thumbnail(piece.start, piece.streams["rgb"][0]))
        if len(self.thumbnails) > _THUMBNAILS:
            self.thumbnails, self._every = self.thumbnails[::2], self._every * 2


def _adjoin(one: RawClip, other: RawClip) -> bool:
    return other.start - (one.start + one.seconds) < 0.5 / one.fps


def _check_counts(stride: int, after: int) -> None:
    if not 1 <= stride <= _MOST_STRIDE:
        raise UserError(f"windows {stride} to a length", where="--stride", expected=f"1 to {_MOST_STRIDE}")
    if after < 1:
        raise UserError(f"{after} windows in a row", where="--after", expected="1 or more")


class Course:
    """The moments that a timeline draws, of a watch that may never end.

    Where they would be too many, each of them stands for several: the one that rings, or has the highest score.
    """

    def __init__(self) -> None:
        self._kept: list[Moment] = []
        self._next: list[Moment] = []
        self._each = 1

    @property
    def moments(self) -> list[Moment]:
        """In their order; the last may stand for fewer than the others."""
        return [*self._kept, *([_loudest(self._next)] if self._next else [])]

    def add(self, moment: Moment) -> None:
        """Takes the next one."""
        self._next.append(moment)
        if len(self._next) == self._each:
            self._kept.append(_loudest(self._next))
            self._next = []
        if len(self._kept) == _POINTS:
            pairs = zip(self._kept[::2], self._kept[1::2], strict=True)
            self._kept, self._each = [_loudest(pair) for pair in pairs], self._each * 2


def _loudest(moments: Sequence[Moment]) -> Moment:
    return max(moments, key=lambda moment: (moment.alarm, moment.score))


def join(parts: list[RawClip]) -> RawClip:
    """Returns consecutive pieces as one clip; a piece without sound among others with sound is silent."""
    first = parts[0]
    joined = RawClip(fps=first.fps, start=first.start)
    for name in ("rgb", "flow"):
        if all(name in part.streams for part in parts):
            joined.streams[name] = np.concatenate([part.streams[name] for part in parts])
    if any("audio" in part.streams for part in parts):
        joined.streams["audio"] = np.concatenate([_sound(part) for part in parts])
    return joined


def _sound(piece: RawClip) -> NDArray[np.float32]:
    wanted = round(piece.seconds * SAMPLE_RATE)
    samples = piece.streams.get("audio", np.zeros(0, np.float32))[:wanted]
    return np.pad(samples, (0, wanted - len(samples)))


def watched(path: Path, moments: list[Moment], watch: Watch) -> Path:
    """Writes the timeline of what was watched as PNG.

    Raises:
        UserError: where it cannot be written.
    """
    from crossgate.evaluation import style
    from crossgate.evaluation.timeline import timeline

    weights = {
        name: np.array([(moment.weights or {}).get(name, np.nan) for moment in moments])
        for name in (moments[0].weights or {} if moments else {})
        if any(name in moment.modalities for moment in moments)
    }
    figure = timeline(
        np.array([(moment.start_s + moment.end_s) / 2 for moment in moments]),
        np.array([moment.score for moment in moments]),
        weights,
        np.array([moment.alarm for moment in moments], dtype=bool),
        watch.thumbnails,
        label=watch.label,
        on=watch.alarm.on,
        off=watch.alarm.off,
    )
    with writing("the picture", path):
        path.write_bytes(style.png(figure))
    return path
