"""A sliding window over a long video: scores over time as they come, an alarm with hysteresis, a timeline."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
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
from crossgate.registry.sources import Settings, resolve

_DAY = 24 * 3600.0
_HYSTERESIS = 0.7
_THUMBNAILS = 400  # kept at most; then every other one is dropped


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
        video: path, http(s) or s3 URL, which is fetched whole, or the URL of a live stream (`clips.live.SCHEMES`).
        live: an http(s) URL is a live stream too.
        stride: windows begin so many to a window's length (2: each overlaps half of the one before).
        label: watched class (empty: the model's positive one).
        on: score from which the alarm rings (None: that from which the model answers with the class).
        off: score below which it stops (None: 0.7 of `on`).
        after: windows in a row that must reach `on`.
        tracking_uri: server of a registered model.

    Raises:
        UserError: no such model, class or video.
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
        with ExitStack() as opened:
            registered = model.startswith("models:/")
            folder = opened.enter_context(fetched(model, TrackingConfig(uri=tracking_uri))) if registered else model
            self._predictor = Predictor(folder)
        card = self._predictor.card
        self.label = label or card.positive
        if self.label not in card.classes:
            raise UserError(f"no class '{self.label}'", where="--label", expected=", ".join(card.classes))
        self._limits = Limits(seconds=_DAY)
        self._video: Source
        if live or video.split("://", 1)[0] in SCHEMES:
            self._limits = Limits(seconds=math.inf)
            with decoding(shown(video), CHECK_STREAM):
                sound = "audio" in self._predictor.modalities
                self._video = Live(video, pixels=self._limits.pixels, sound=sound)
        else:
            self._video = resolve(video, Settings(megabytes=8 << 10)).video
        self._stride = stride
        if on is None:
            on = min(1.0, card.threshold) if self.label == card.positive else 0.5
        self.alarm = Alarm(on, _HYSTERESIS * on if off is None else off, after)
        self.thumbnails: list[Thumbnail] = []
        self._every = 1
        self.seconds = self.busy = 0.0

    @property
    def speed(self) -> float:
        """Seconds of video watched in a second: real time from 1 on."""
        return self.seconds / self.busy if self.busy else 0.0

    def __iter__(self) -> Iterator[Moment]:
        try:
            yield from self._moments()
        finally:
            if isinstance(self._video, Live):
                self._video.close()

    def _moments(self) -> Iterator[Moment]:
        clip = self._predictor.card.clip
        pieces = iter_clips(
            self._video,
            seconds=clip.seconds / self._stride,
            short_side=max(128, clip.size),
            modalities={*self._predictor.modalities} - {"depth"},
            limits=self._limits,
        )
        held: list[RawClip] = []
        count = 0
        while True:
            begun = time.perf_counter()
            piece = next(pieces, None)
            if piece is None:
                break
            held = [*held, piece][-self._stride :]
            self.seconds = piece.start + piece.seconds
            moment = self._moment(held) if len(held) == self._stride else None
            self._keep(piece, count)
            count += 1
            self.busy += time.perf_counter() - begun
            if moment is not None:
                yield moment
        if 0 < count < self._stride:  # shorter than a window
            yield self._moment(held)

    def _moment(self, pieces: list[RawClip]) -> Moment:
        joined = join(pieces)
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


def join(pieces: list[RawClip]) -> RawClip:
    """Returns consecutive pieces as one clip; a piece without sound among others with sound is silent."""
    first = pieces[0]
    joined = RawClip(fps=first.fps, start=first.start)
    for name in ("rgb", "flow"):
        if all(name in piece.streams for piece in pieces):
            joined.streams[name] = np.concatenate([piece.streams[name] for piece in pieces])
    if any("audio" in piece.streams for piece in pieces):
        joined.streams["audio"] = np.concatenate([_sound(piece) for piece in pieces])
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
