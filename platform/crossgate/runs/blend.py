"""Weights of the losses of a fine-tuning, estimated from a run that was made without them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossgate.errors import UserError
from crossgate.modality import MODALITIES
from crossgate.training.metrics import read_metrics


def estimate_blend(run_dir: Path) -> dict[str, float]:
    """Returns head (`fused`, then modalities) -> weight, from the run's first validation to its last.

    Training losses are the last that were logged up to either validation.

    Raises:
        UserError: for a run that did not validate twice with losses logged before, or where no head got better.
    """
    trained: dict[str, Any] = {}
    points: list[tuple[dict[str, Any], dict[str, Any]]] = []  # last line of training before it, line of a validation
    for line in read_metrics(run_dir):
        if _measured(line) and trained:
            points.append((trained, line))
        if line.get("train/loss/fused") is not None:
            trained = line
    if len(points) < 2:
        raise UserError(
            f"{len(points)} validations of modalities' heads with training losses logged before them",
            where=str(run_dir),
            expected="two or more",
            cure="train with a smaller training.eval_every, and training.log_every no larger",
        )
    first, last = points[0], points[-1]
    modalities = _measured(last[1])
    keys = ["val/nll", *(f"val/nll_{name}" for name in modalities)]
    train = [[line[f"train/loss/{head}"] for head in ("fused", *modalities)] for line, _ in (first, last)]
    val = [[line[key] for key in keys] for _, line in (first, last)]
    weights = blend_weights(train[0], val[0], train[1], val[1])
    if not any(weights):
        steps = f"steps {first[1]['step']} and {last[1]['step']}"
        raise UserError(
            f"no head got better on validation between {steps}", where=str(run_dir), cure="train for longer"
        )
    return dict(zip(("fused", *modalities), weights))


def blend_weights(
    first_train: Sequence[float], first_val: Sequence[float], last_train: Sequence[float], last_val: Sequence[float]
) -> list[float]:
    """Returns how much the loss of each head should count, in sum 1; all 0 where no head got better.

    Gradient-Blending (Wang et al. 2020, arXiv 1905.12681, section 3.2): ``w_k ~ G_k / O_k^2``, where between two points
    of training ``G`` is by how much the loss fell on validation clips and ``O`` by how much the gap between validation
    and training loss grew. A head that got worse on validation gets nothing. A gap that grew by less than a hundredth
    counts as a hundredth: below that the estimate is noise, and its square would decide alone.

    Args:
        first_train, first_val, last_train, last_val: losses of the heads in nats, at the two points.
    """
    gains = [max(before - after, 0.0) for before, after in zip(first_val, last_val)]
    gaps = [max((v1 - t1) - (v0 - t0), 0.01) for t0, v0, t1, v1 in zip(first_train, first_val, last_train, last_val)]
    shares = [gain / gap**2 for gain, gap in zip(gains, gaps)]
    total = sum(shares)
    return [share / total if total else 0.0 for share in shares]


def _measured(line: dict[str, Any]) -> list[str]:
    """Returns the modalities whose heads a validation measured."""
    return [name for name in MODALITIES if line.get(f"val/nll_{name}") is not None]
