"""Settings of what comes after training: measurements, the release."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from crossgate.config.base import Config, FolderUrl, Fraction, Positive


class EvaluationConfig(Config):
    """What is measured after training."""

    probe: bool = True
    """Linear probe on frozen features (pretraining)."""
    knn: Positive = 20
    """Neighbours of the kNN classifier."""
    gallery: Positive = 1000
    """Largest retrieval gallery."""
    unit: Literal["clip", "video"] = "clip"
    """What a classifier is measured on: clips, or the videos that `crossgate pack` cut them from, whose class
    probabilities are the means over their clips, as most published numbers are. Validation, and the threshold that is
    chosen on it, go by the same."""
    frames: bool = False
    """Also measure the average precision of frames (fine-tuning to two classes): every clip's score stands for its
    frames. Needs test videos packed with the frames of their events, as `shards/xd_violence.py` notes them."""
    clips: Positive = 20000
    """Clips of a split that are measured, at most."""
    model: str = ""
    """Run directory or model directory to measure (runs of kind evaluate)."""
    bootstrap: Positive = 1000
    """Resamples of groups for the 95 % intervals."""
    fixed_fpr: Fraction = 0.1
    """False-positive rate at which misses of the positive class are counted."""
    random_baseline: bool = True
    """Also probe a randomly initialised encoder (pretraining)."""


class ReleaseConfig(Config):
    """The MLflow registry, and what a version must show before it takes the place of the present one."""

    name: str = ""
    """Registered model's name (empty: crossgate-TASK)."""
    alias: str = "champion"
    """Alias that the version gets if it passes the gate, as the first version of a name always does; the newest
    version is `challenger` in any case."""
    index: FolderUrl = ""
    """Index whose test splits are the frozen evaluation set (empty: the run's own `data.index`)."""
    margin: Fraction = 0.05
    """How much worse than the champion it could be, at the lower end of the paired 95 % interval, and still pass."""
    slice_margin: Fraction = 0.1
    """How much accuracy it may lose in a class, or in the clips that lack or have degraded a modality."""
    slice_clips: Positive = 10
    """Slices of fewer clips decide nothing."""
    latency_ratio: Annotated[float, Field(gt=0)] = 1.5
    """Longest forward pass of one clip, in those of the champion."""
    latency_ms: Annotated[float, Field(ge=0)] = 0.0
    """Longest forward pass of one clip in milliseconds, on the machine that releases (0: no such bound)."""
