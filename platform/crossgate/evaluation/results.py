"""results.json: every number of a run under flat names with slashes, which MLflow takes as they are.

A number with an interval is three entries: ``test/accuracy``, ``test/accuracy_low``, ``test/accuracy_high``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossgate.errors import UserError

FORMAT = 1
_PROBE = re.compile(r"^test/linear_probe/([^/]+)/")
_CHANCE = {
    "test/accuracy": ("test/chance_majority", "test/chance_uniform"),
    "test/mean_class_accuracy": ("test/chance_uniform",),
    "test/average_precision": ("test/chance_average_precision",),
}


def metric_name(*parts: str) -> str:
    """Joins parts with slashes and replaces what MLflow would refuse by underscores."""
    return "/".join(re.sub(r"[^A-Za-z0-9_.-]+", "_", part).strip("_") or "_" for part in parts)


def chance_of(metrics: Mapping[str, float], name: str) -> float:
    """Returns what knowing nothing reaches in a metric of a run, NaN where that is not known."""
    probed = _PROBE.match(name)
    if probed:
        names: tuple[str, ...] = tuple(f"test/chance_{probed[1]}_{kind}" for kind in ("majority", "uniform"))
    else:
        names = _CHANCE.get(name, (f"{name}_chance",))
    return max((metrics[one] for one in names if one in metrics), default=math.nan)


def write_results(path: str | Path, metrics: Mapping[str, float], provenance: Mapping[str, Any] | None = None) -> None:
    """Writes beside and renames. What could not be measured (NaN) becomes null; infinities are refused.

    Raises:
        ValueError: for an infinite metric.
    """
    path = Path(path)
    numbers = {name: None if math.isnan(value) else float(value) for name, value in sorted(metrics.items())}
    body = {"format": FORMAT, "metrics": numbers, "provenance": dict(provenance or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_results(path: str | Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns metrics (null as NaN) and provenance.

    Raises:
        UserError: when the file is missing or is no results file of this format.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        numbers = {str(k): math.nan if v is None else float(v) for k, v in body["metrics"].items()}
        found, provenance = body["format"], dict(body["provenance"])
    except FileNotFoundError:
        raise UserError("no such results file", where=path, cure="run `crossgate evaluate` first") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("not a results file", where=path, expected="the results.json of a run") from None
    if found != FORMAT:
        raise UserError(f"results format {found}", where=path, expected=f"format {FORMAT}")
    return numbers, provenance
