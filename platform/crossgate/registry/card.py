"""The model card that stands in the registry as a version's description: plain Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from crossgate.model.store import ModelCard

_ROWS = 60  # of a table of metrics; the rest is in the run
_DESCRIPTION = 5000  # characters that MLflow's tables hold; SQLite alone takes more
# A metric stands in the first table whose prefix it has: the table of `test/` is printed after its parts' tables.
_TABLES = (
    ("By slice of the test groups: classes, missing and degraded modalities", "test/slice/"),
    ("How the gate behaves on the test groups", "test/gate/"),
    ("Against single modalities, averages and controls, on the test groups", "test/compare/"),
    ("Measured on the test groups", "test/"),
    ("Measured on the validation groups", "val/"),
)


def description(card: ModelCard, metrics: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """Returns the card's text as far as a version's description can hold it: its tables are cut, nothing else."""
    rows = _ROWS
    while len(text := model_card(card, metrics, facts, rows)) > _DESCRIPTION and rows > 1:
        rows //= 2
    return text[:_DESCRIPTION]


def model_card(card: ModelCard, metrics: Mapping[str, float], facts: Mapping[str, Any], rows: int = _ROWS) -> str:
    """Returns the card's text.

    Args:
        card: of the model directory.
        metrics: flat names; ``NAME_low`` and ``NAME_high`` are the 95 % interval of ``NAME``.
        facts: lineage, as label -> value; empty values are left out.
        rows: of a table of metrics, at most.
    """
    clip = card.clip
    lines = [
        f"# {card.task or 'classifier'}: {', '.join(card.classes)}",
        "",
        f"Input: a video, cut into clips of {clip.seconds:g} s ({clip.frames} frames of {clip.size} x {clip.size}). "
        f"Modalities: {', '.join(clip.modalities)}; any of them may be missing. Fusion: {card.model.fusion.name}.",
        "",
        "Output, one row a clip: label, score, score of each class, gate weight of each modality, modalities used.",
        *([f"The label is `{card.positive}` from a score of {card.threshold:.3g} on."] if card.positive else []),
        "",
        *_data(metrics),
        f"Digest of the weights: `{card.digest}`.",
        "",
        *_table(
            "Lineage", ("what", "value"), [(key, str(value)) for key, value in facts.items() if value not in ("", None)]
        ),
    ]
    measured = [name for name in sorted(metrics) if not name.endswith(("_low", "_high"))]
    for title, prefix in _TABLES:
        own = [name for name in measured if name.startswith(prefix)]
        measured = [name for name in measured if name not in own]
        found = [(name.removeprefix(prefix), _number(metrics, name)) for name in own]
        lines += _table(title, ("metric", "value (95 % interval by group)"), found, rows)
    lines += _table("Also measured", ("metric", "value"), [(name, _number(metrics, name)) for name in measured], rows)
    lines += ["## Limits", "", *(f"- {limit}" for limit in _limits(card)), ""]
    lines += [
        "## Licence",
        "",
        "Code: Apache-2.0. The weights follow the licences of the clips they were trained on.",
        "",
    ]
    return "\n".join(lines)


def _data(metrics: Mapping[str, float]) -> list[str]:
    if not metrics.get("test/clips"):
        return []
    clips, groups = round(metrics["test/clips"]), round(metrics.get("test/groups", 0))
    return [f"Measured on {clips} test clips of {groups} groups (source videos); none of these was trained on.", ""]


def _limits(card: ModelCard) -> list[str]:
    limits = [
        "Scores are not calibrated probabilities of an event; choose a threshold on your own recordings (`threshold`).",
        "Measured on groups (source videos) never trained on, yet of the same collections: other cameras, places and "
        "people can do worse.",
        f"Trained on clips of {card.clip.seconds:g} s: what takes longer, or is over in a few frames, can be missed.",
    ]
    if "depth" in card.clip.modalities:
        limits.append("Depth is used only where the request names a depth sensor's stream.")
    if card.positive:
        limits.append(f"A low score of `{card.positive}` is no proof of safety: a person has to decide what follows.")
    return limits


def _table(title: str, head: tuple[str, str], rows: list[tuple[str, str]], longest: int = _ROWS) -> list[str]:
    if not rows:
        return []
    shown = [f"| {name} | {value} |" for name, value in rows[:longest]]
    more = [f"| ... | {len(rows) - longest} more in the run |"] if len(rows) > longest else []
    return [f"## {title}", "", f"| {head[0]} | {head[1]} |", "| --- | --- |", *shown, *more, ""]


def _number(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if math.isnan(metrics[name]):
        return "not measurable"
    interval = f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else ""
    return f"{metrics[name]:.4g}{interval}"
