"""Settings of the study: gates trained on the kept features of frozen encoders, and compared."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from crossgate.config.base import Config, Fraction, Positive


class StudyConfig(Config):
    """Gates on the same frozen encoders (runs of kind `study`), besides `finetune`, `optim` and `model.fusion`."""

    gates: tuple[str, ...] = ()
    """Fusions to compare (empty: every one that fits the modalities); see `crossgate explain fusion`."""
    seeds: Positive = 5
    """Seeds of folds, heads and gates, from `run.seed` on."""
    folds: Annotated[int, Field(ge=2, le=20)] = 4
    """Parts of the training groups; a gate learns from the scores that each part gets from heads of the others."""
    steps: Positive = 240
    """Optimiser steps of the heads, and again of each gate."""
    batch: Positive = 128
    """Clips in a step."""
    eval_every: Positive = 20
    """Steps between two looks at validation; the weights of the lowest log loss there are kept."""
    dropout: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.0, 0.3, 0.5)
    """Modality dropout that every gate is trained with in turn, in place of `model.fusion.modality_dropout`; validation
    keeps one."""
    entropy: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.0, 0.3)
    """The same for `model.fusion.entropy`, for gates whose weights learn."""
    labels: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.01, 0.1, 1.0)
    """Shares of the training labels at which the encoders are compared with random ones (empty: they are not)."""
    noise: tuple[Fraction, ...] = (0.25, 0.5, 0.75, 1.0)
    """Severities at which each modality of the test clips is spoiled in turn (empty: none is)."""
