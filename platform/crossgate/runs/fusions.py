"""What a fusion is, by its name: which are averages, which are gates, and what a gate has to beat."""

from __future__ import annotations

from crossgate.model.fusion import FUSIONS

GATE = "model.fusion.name"
AVERAGES = tuple(name for name, fusion in FUSIONS.items() if fusion.kind == "average")


def is_gate(name: str) -> bool:
    """Whether it weighs each clip's modalities: what another fusion gains is no gate's."""
    return FUSIONS[name].kind == "gate"


def average_for(name: str) -> str:
    """Returns the average of what a fusion mixes, features or class scores: else its gain may be late fusion's."""
    return "average_probabilities" if FUSIONS[name].needs_logits else "mean"
