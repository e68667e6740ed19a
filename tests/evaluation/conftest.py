"""Simulated predictions with a known truth, so that what an evaluation should find is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from crossgate.evaluation import Predictions

MODALITIES = ("rgb", "flow", "audio", "depth")


def simulate(
    clips: int,
    seed: int,
    classes: int = 5,
    *,
    split: str = "test",
    skill: float = 1.0,
    task: str = "action",
    modalities: tuple[str, ...] = MODALITIES,
    clips_per_group: int = 4,
) -> Predictions:
    """A gate that knows which modality is degraded, over streams whose evidence fades with the degradation.

    `skill` 0 is a network that knows nothing. One clip in five lacks audio, one in eight depth.
    """
    draws = np.random.default_rng(seed)
    m = len(modalities)
    labels = draws.integers(classes, size=clips)
    group = np.arange(clips) // clips_per_group + 10_000 * seed
    severity = np.where(draws.random((clips, m)) < 0.4, draws.random((clips, m)), 0.0)
    present = np.ones((clips, m), dtype=bool)
    present[:, m - 2] = draws.random(clips) > 0.2
    present[:, m - 1] = draws.random(clips) > 0.125
    evidence = skill * 2.2 * (1 - severity)[:, :, None] * np.eye(classes)[labels][:, None, :]
    unimodal = evidence + draws.normal(size=(clips, m, classes))
    raw = np.where(present, np.exp(-3 * severity + 0.2 * draws.normal(size=(clips, m))), 0.0)
    weights = raw / raw.sum(axis=1, keepdims=True)
    directions = np.random.default_rng(7).normal(size=(m, classes, 16))  # the same for every split
    identity = draws.normal(size=(clips, 1, 16))
    features = np.einsum("nmk,mkd->nmd", unimodal, directions)
    return Predictions(
        modalities=modalities,
        features=features.astype(np.float32),
        embeddings=(skill * identity + 1.5 * draws.normal(size=(clips, m, 16))).astype(np.float32),
        fused=np.einsum("nm,nmd->nd", weights, features).astype(np.float32),
        weights=weights.astype(np.float32),
        logits=(3 * np.einsum("nm,nmk->nk", weights, unimodal)).astype(np.float32),
        unimodal_logits=unimodal.astype(np.float32),
        present=present,
        group=group,
        labels={task: labels},
        degraded=severity.astype(np.float32),
        keys=[f"{split}-{i}" for i in range(clips)],
    )


@pytest.fixture
def simulated() -> Callable[..., Predictions]:
    return simulate
