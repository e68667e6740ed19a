"""Frame-level average precision of untrimmed videos: each clip's score stands for its frames, whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

from crossgate.evaluation.classification import average_precision, softmax
from crossgate.evaluation.evaluation import Evaluation
from crossgate.evaluation.intervals import Bootstrap, Interval
from crossgate.evaluation.predictions import Array, Predictions
from crossgate.evaluation.report import Section
from crossgate.evaluation.scored import Question
from crossgate.evaluation.tables import Table, bounds, percent

AVERAGE, TRAPEZOID = "frame_average_precision", "frame_average_precision_trapezoid"


@dataclass(frozen=True)
class Span:
    """Where a clip lies in its video, and where the video's events are.

    Attributes:
        video: the same for all clips of a video, and for no others.
        begin: its first frame, counted at the video's own rate.
        frames: of the whole video.
        events: ``(first frame, frame after the last)`` of each event, as the data set annotates them.
    """

    video: str
    begin: int
    frames: int
    events: tuple[tuple[int, int], ...]


def counted(spans: Sequence[Span]) -> NDArray[np.int64]:
    """Returns ``(N, 2)``: frames without and with an event that each clip's score stands for.

    A clip stands for all frames from its first to that of the video's next clip: the last one also for a rest too
    short to be a clip, the first also for what lies before it. Every frame counts once.
    """
    table = np.zeros((len(spans), 2), np.int64)
    videos: dict[str, list[int]] = {}
    for row, span in enumerate(spans):
        videos.setdefault(span.video, []).append(row)
    for rows in videos.values():
        rows.sort(key=lambda row: spans[row].begin)
        video = spans[rows[0]]
        truth = np.zeros(video.frames, bool)
        for first, after in video.events:
            truth[max(0, first) : max(0, after)] = True
        edges = [0, *(min(spans[row].begin, video.frames) for row in rows[1:]), video.frames]
        for row, first, after in zip(rows, edges, edges[1:]):
            positive = int(truth[first:after].sum())
            table[row] = after - first - positive, positive
    return table


def frame_level(scores: Array, spans: Sequence[Span], bootstrap: Bootstrap) -> dict[str, Interval]:
    """Returns the average precision over all frames, stepwise with its interval, and by the trapezoidal rule.

    Args:
        scores: ``(N,)`` of the positive class, one a clip.
        spans: of the same clips.
        bootstrap: over their groups.
    """
    frames = counted(spans)  # frames of a clip share its score: counts do for them
    truth = np.repeat([[0, 1]], len(scores), axis=0).reshape(-1)
    doubled, weight = np.repeat(scores, 2), frames.reshape(-1).astype(np.float64)
    if not frames[:, 1].any() or not frames[:, 0].any():
        nothing = Interval(math.nan, math.nan, math.nan, bootstrap.groups, bootstrap.clips)
        return {AVERAGE: nothing, TRAPEZOID: nothing}
    stepwise = average_precision(doubled, truth.astype(bool))

    def statistic(weights: Array) -> Array:
        return stepwise(np.repeat(weights, 2, axis=1) * weight)

    kept = weight > 0
    precision, recall, _ = sk.precision_recall_curve(truth[kept], doubled[kept], sample_weight=weight[kept])
    area = float(sk.auc(recall, precision))
    return {
        AVERAGE: bootstrap.interval(statistic),
        TRAPEZOID: Interval(area, math.nan, math.nan, bootstrap.groups, bootstrap.clips),
    }


def add_frames(
    done: Evaluation, clips: Predictions, spans: Mapping[str, Span], question: Question, resamples: int, seed: int
) -> None:
    """Adds the frame-level scores of test clips to an evaluation; clips without a span are left out and counted.

    Args:
        clips: with logits.
        spans: key of a clip -> where it lies.
        question: of two classes.
        resamples: of groups.
        seed: of the resamples.
    """
    assert clips.logits is not None and question.index is not None
    known = clips.select(np.array([key in spans for key in clips.keys], bool))
    if not len(known):
        return
    there = [spans[key] for key in known.keys]
    bootstrap = Bootstrap(known.group, resamples, seed)
    assert known.logits is not None
    found = frame_level(softmax(known.logits)[:, question.index], there, bootstrap)
    for name, one in found.items():
        done.put(f"test/{name}", one)
    frames = counted(there).sum(axis=0)
    videos = len({span.video for span in there})
    done.metrics |= {"test/frames": float(frames.sum()), "test/frames_positive": float(frames[1])}
    rows = [
        ["average precision of frames, stepwise", percent(found[AVERAGE].value), bounds(found[AVERAGE])],
        ["the same by the trapezoidal rule", percent(found[TRAPEZOID].value), ""],
    ]
    text = [
        f"Every frame of {videos} whole videos has the score of the clip that it lies in: {frames.sum()} frames, "
        f"{percent(frames[1] / frames.sum())} of them annotated as {question.positive}, which is what guessing gives. "
        "Published numbers of XD-Violence are by the trapezoidal rule, as its authors' code computes them.",
    ]
    left = len(clips) - len(known)
    caption = f"{len(known)} clips of {bootstrap.groups} groups; {left} clips of videos without annotation left out."
    done.sections.append(Section("Frames", text, [Table(["measure", "value", "95 % interval"], rows, caption)]))
