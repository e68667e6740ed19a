"""Frame-level average precision: against every frame written out, with rests, gaps and groups."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from crossgate.evaluation.frames import AVERAGE, TRAPEZOID, Span, counted, frame_level
from crossgate.evaluation.intervals import Bootstrap

EVENTS = {"a": ((10, 37), (30, 52)), "b": (), "c": ((0, 5), (95, 200))}  # two overlap, one ends after its video
FRAMES = {"a": 60, "b": 43, "c": 100}
BEGINS = {"a": (0, 20, 40), "b": (0, 20), "c": (20, 40, 80)}  # b has a rest, c lacks its first clip and its fourth


def clips() -> tuple[list[Span], np.ndarray]:
    """All clips, shuffled, and a score of each; two clips have the same."""
    spans = [Span(video, begin, FRAMES[video], EVENTS[video]) for video in BEGINS for begin in BEGINS[video]]
    order = np.random.default_rng(0).permutation(len(spans))
    return [spans[i] for i in order], np.array([0.9, 0.6, 0.3, 0.2, 0.5, 0.6, 0.1, 0.8])[order]


def written_out(spans: list[Span], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth and score of every frame, one by one."""
    truth, said = [], []
    for video, frames in FRAMES.items():
        own = sorted((span.begin, score) for span, score in zip(spans, scores) if span.video == video)
        for frame in range(frames):
            truth.append(any(first <= frame < after for first, after in EVENTS[video]))
            said.append(([score for begin, score in own if begin <= frame] or [own[0][1]])[-1])
    return np.array(truth), np.array(said)


def test_every_frame_counts_once_and_is_judged_by_the_clip_that_it_lies_in() -> None:
    spans, scores = clips()
    truth, said = written_out(spans, scores)
    assert counted(spans).sum() == sum(FRAMES.values()) == len(truth)
    assert counted(spans)[:, 1].sum() == truth.sum() == 42 + 0 + 10
    found = frame_level(scores, spans, Bootstrap(np.arange(len(spans)), 20))
    assert found[AVERAGE].value == pytest.approx(sk.average_precision_score(truth, said), abs=1e-12)
    precision, recall, _ = sk.precision_recall_curve(truth, said)
    assert found[TRAPEZOID].value == pytest.approx(sk.auc(recall, precision), abs=1e-12)
    assert abs(found[TRAPEZOID].value - found[AVERAGE].value) > 1e-3  # they are two measures


def test_perfect_scores_give_one_and_constant_ones_the_share_of_events() -> None:
    spans = [Span("v", begin, 40, ((20, 40),)) for begin in (0, 20)]
    own = Bootstrap(np.zeros(2), 1)
    assert frame_level(np.array([0.1, 0.9]), spans, own)[AVERAGE].value == pytest.approx(1)
    assert frame_level(np.array([0.5, 0.5]), spans, own)[AVERAGE].value == pytest.approx(0.5)


def test_the_interval_resamples_whole_videos() -> None:
    rng = np.random.default_rng(1)
    spans = [Span(f"v{v}", 10 * c, 35, ((7 * (v % 4), 20),)) for v in range(12) for c in range(3)]
    scores, group = rng.random(len(spans)), np.repeat(np.arange(12), 3)
    bootstrap = Bootstrap(group, 40, seed=3)
    found = frame_level(scores, spans, bootstrap)[AVERAGE]
    plain, table = [], counted(spans)
    for weights in np.concatenate(list(bootstrap.weights())).astype(int):
        repeats = (table * weights[:, None]).reshape(-1)
        truth = np.repeat(np.tile([0, 1], len(spans)), repeats)
        plain.append(sk.average_precision_score(truth, np.repeat(np.repeat(scores, 2), repeats)))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=1e-9)


def test_without_events_or_without_calm_there_is_no_number() -> None:
    for events in ((), ((0, 40),)):
        spans = [Span("v", begin, 40, events) for begin in (0, 20)]
        assert np.isnan(frame_level(np.array([0.1, 0.9]), spans, Bootstrap(np.zeros(2), 1))[AVERAGE].value)
