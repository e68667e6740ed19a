"""Measuring videos instead of clips."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from crossgate.config import EvaluationConfig
from crossgate.evaluation import Predictions, evaluate_classifier
from crossgate.evaluation.classification import softmax
from crossgate.evaluation.videos import by_video


@pytest.fixture
def of_videos(simulated) -> Callable[..., Predictions]:
    """Clips of videos, shuffled: those of a video share group and label."""

    def make(clips: int, seed: int, a_video: int = 4, **more: object) -> Predictions:
        found = simulated(clips, seed, clips_per_group=a_video, **more)
        video = np.arange(clips) // a_video
        found.labels = {task: labels[video * a_video] for task, labels in found.labels.items()}
        found.keys = [f"v{v}-{i % a_video:04d}" for i, v in enumerate(video)]
        return found.select(np.random.default_rng(seed).permutation(clips))

    return make


def test_a_video_says_the_mean_of_its_clips(of_videos):
    clips = of_videos(24, 1)
    clips.degraded[::2] = np.nan
    videos = by_video(clips)
    assert len(videos) == 6 and len(set(videos.keys)) == 6
    for row, name in enumerate(videos.keys):
        own = np.flatnonzero([key.startswith(f"{name}-") for key in clips.keys])
        assert np.allclose(softmax(videos.logits)[row], softmax(clips.logits[own]).mean(axis=0), atol=1e-6)
        assert np.allclose(videos.weights[row], clips.weights[own].mean(axis=0), atol=1e-6)
        assert (videos.group[row], videos.labels["action"][row]) == (
            clips.group[own[0]],
            clips.labels["action"][own[0]],
        )
        for m in range(4):
            having = own[clips.present[own, m]]
            assert videos.present[row, m] == bool(len(having))
            if len(having):
                alone = softmax(clips.unimodal_logits[having, m]).mean(axis=0)
                assert np.allclose(softmax(videos.unimodal_logits[row, m][None])[0], alone, atol=1e-6)
            known = clips.degraded[own, m][~np.isnan(clips.degraded[own, m])]
            assert np.allclose(videos.degraded[row, m], known.mean() if len(known) else np.nan, equal_nan=True)
    first = {key.rpartition("-")[0]: None for key in clips.keys}
    assert videos.keys == list(first), "in the order of their first clips"


def test_clips_alone_stay_as_they_are(simulated):
    clips = simulated(10, 2)
    clips.keys = [f"v{i}-0000" for i in range(10)]
    videos = by_video(clips)
    assert np.allclose(softmax(videos.logits), softmax(clips.logits), atol=1e-6)
    assert np.array_equal(videos.present, clips.present)
    clips.keys = ["v-0000"] * 10
    clips.group = np.arange(10)
    assert len(by_video(clips)) == 10, "videos of two groups are two, whatever their names"


def test_a_pretrained_models_clips_have_no_logits(of_videos):
    clips = of_videos(8, 3)
    clips.logits = clips.unimodal_logits = clips.weights = None
    videos = by_video(clips)
    assert videos.logits is videos.unimodal_logits is videos.weights is None
    assert videos.features.shape == (2, *clips.features.shape[1:])


@pytest.mark.parametrize("unit", ["clip", "video"])
def test_the_evaluation_goes_by_the_recipes_unit(of_videos, unit):
    val, test, train = (of_videos(200, seed, skill=0.4) for seed in (1, 2, 3))
    config = EvaluationConfig(unit=unit, bootstrap=50)
    done = evaluate_classifier(val, test, list("abcde"), "fight", config, train, task="action")
    counted = by_video(test) if unit == "video" else test
    right = (counted.logits.argmax(axis=1) == counted.labels["action"]).mean()
    assert done.metrics["test/accuracy"] == pytest.approx(right)
    assert done.metrics["test/clips"] == 200
    assert done.metrics.get("test/videos") == (50 if unit == "video" else None)
    assert f"On {len(counted)} test {unit}s of 50 groups" in done.summary
    counted_val = by_video(val) if unit == "video" else val
    right = (counted_val.logits.argmax(axis=1) == counted_val.labels["action"]).mean()
    assert done.metrics["val/accuracy"] == pytest.approx(right)
