"""From clips to videos: what a model says of a whole video is the mean of what it says of its clips."""

from __future__ import annotations

import re

import numpy as np

from crossgate.evaluation.classification import softmax
from crossgate.evaluation.predictions import Array, Predictions

_NUMBER = re.compile(r"-\d{4,}$")  # of the clip within its video, as the packer names it
_TINY = 1e-30


def by_video(clips: Predictions) -> Predictions:
    """Returns one row a video: class probabilities, weights and features are the means over its clips.

    Clips are of one video where their keys differ in the number at the end only, and their groups do not differ. A
    modality's own head is averaged over the clips that have the modality; a video has it if one of them does.
    """
    names = [f"{group} {_NUMBER.sub('', key)}" for group, key in zip(clips.group, clips.keys)]
    _, first, video = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # videos in the order of their first clips
    first, video = np.sort(first), order[video]
    count = len(first)

    def mean(x: Array, counted: Array | None = None) -> Array:
        """Means over clips ``(N, ...)`` -> ``(videos, ...)``; of the `counted` ``(N, M)`` only, 0 where none is."""
        share = np.ones(len(x)) if counted is None else counted.astype(np.float64)
        share = share.reshape(share.shape + (1,) * (x.ndim - share.ndim))
        sums, shares = np.zeros((count, *x.shape[1:])), np.zeros((count, *share.shape[1:]))
        np.add.at(sums, video, np.where(share > 0, x, 0) * share)
        np.add.at(shares, video, share)
        return np.asarray(sums / np.maximum(shares, 1))

    def log_mean(logits: Array | None, counted: Array | None = None) -> Array | None:
        return None if logits is None else np.log(np.maximum(mean(softmax(logits), counted), _TINY)).astype(np.float32)

    known = ~np.isnan(clips.degraded)
    alone = mean(clips.present.astype(np.float64)) > 0
    return Predictions(
        modalities=clips.modalities,
        features=mean(clips.features, clips.present).astype(np.float32),
        embeddings=None if clips.embeddings is None else mean(clips.embeddings, clips.present).astype(np.float32),
        fused=mean(clips.fused).astype(np.float32),
        weights=None if clips.weights is None else mean(clips.weights).astype(np.float32),
        logits=log_mean(clips.logits),
        unimodal_logits=log_mean(clips.unimodal_logits, clips.present),
        present=alone,
        group=clips.group[first],
        labels={task: labels[first] for task, labels in clips.labels.items()},
        degraded=np.where(mean(known.astype(np.float64)) > 0, mean(clips.degraded, known), np.nan).astype(np.float32),
        keys=[_NUMBER.sub("", clips.keys[row]) for row in first],
    )
