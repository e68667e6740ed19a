"""Weights of the losses of a fine-tuning, estimated from a run that was made without them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossgate.errors import UserError
from crossgate.modality import MODALITIES
from crossgate.training.metrics import read_metrics

NOISE = 0.01
"""Nats; the square of a smaller growth of overfitting would be divided by, and chance alone decide the weights."""


def estimate_blend(run_dir: Path) -> dict[str, float]:
    """Returns head (`fused`, then modalities) -> weight, from the run's first validation to its last.

    Raises:
        UserError: for a run that did not measure training clips twice with validation's, where no head got better, or
            where one did whose overfitting is too small to be told from noise.
    """
    if not run_dir.is_dir():
        raise UserError("no such run directory", where=str(run_dir), cure="give the folder of a fine-tuning run")
    first, last = _ends(run_dir)
    modalities = [name for name in _measured(first) if name in _measured(last)]
    heads = ("fused", *modalities)
    keys = ("nll", *(f"nll_{name}" for name in modalities))
    gains = [first[f"val/{key}"] - last[f"val/{key}"] for key in keys]
    gaps = [_gap(last, key) - _gap(first, key) for key in keys]
    steps = f"between steps {first['step']} and {last['step']}"
    if max(gains) <= 0:
        raise UserError(f"no head got better on validation {steps}", where=str(run_dir), cure="train for longer")
    vague = [head for head, gain, gap in zip(heads, gains, gaps) if gain > 0 and gap < NOISE]
    if vague:
        raise UserError(
            f"what {', '.join(vague)} overfits cannot be told from noise: {steps} validation's loss above training's "
            f"grew by less than {NOISE} nats, whose square would decide all weights",
            where=str(run_dir),
            cure="train for longer, or keep finetune.unimodal_weight",
        )
    return dict(zip(heads, blend_weights(gains, gaps)))


def blend_weights(gains: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Returns how much the loss of each head should count, in sum 1.

    Gradient-Blending (Wang et al. 2020, arXiv 1905.12681, section 3.2): ``w_k ~ G_k / O_k^2``. A head that got worse on
    validation gets nothing.

    Args:
        gains: ``G``, by how much the heads' losses fell on validation clips between two points of training; one of
            them above 0.
        gaps: ``O``, by how much the gap between validation and training loss grew; above 0 where the gain is.
    """
    shares = [gain / gap**2 if gain > 0 else 0.0 for gain, gap in zip(gains, gaps)]
    return [share / sum(shares) for share in shares]


def _ends(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the first and last line of metrics with losses of validation and of training clips."""
    lines = read_metrics(run_dir)
    points = [line for line in lines if _measured(line)]
    if not points and any("val/nll" in line for line in lines):
        raise UserError(
            "no validation measured training clips as well, without which overfitting is not known",
            where=str(run_dir),
            cure="train with finetune.measure_train=true",
        )
    if len(points) < 2:
        raise UserError(
            f"{len(points)} validations of modalities' heads",
            where=str(run_dir),
            expected="two or more",
            cure="train with a smaller training.eval_every",
        )
    return points[0], points[-1]


def _gap(line: dict[str, Any], key: str) -> float:
    """By how much validation's loss lies above that of training clips."""
    return line[f"val/{key}"] - line[f"train/{key}"]


def _measured(line: dict[str, Any]) -> list[str]:
    """Returns the modalities whose heads were measured, on validation and on training clips."""
    keys = {name: (f"val/nll_{name}", f"train/nll_{name}") for name in MODALITIES}
    return [name for name, both in keys.items() if all(line.get(key) is not None for key in both)]
