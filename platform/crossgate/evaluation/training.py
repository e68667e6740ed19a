"""How training went, as the last section of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossgate.evaluation.evaluation import Evaluation
from crossgate.evaluation.figures import training_curves
from crossgate.evaluation.report import Section


def training_section(done: Evaluation, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds the curves of losses, validation scores and gate weights; nothing for a run that did not train.

    Args:
        done: gets the section.
        rows: of the run's ``metrics.jsonl``.
    """
    if not rows:
        return
    caption = (
        "Loss should fall and level off, validation should rise with it; a loss that falls while validation falls "
        "too is memory, not learning. Gate weights are means over the training clips that have the modality."
    )
    steps = f"{max(row['step'] for row in rows)} optimiser steps; every number is in metrics.jsonl."
    done.add(Section("Training", [steps]), ("training", training_curves(rows), caption))
