"""`metrics.jsonl` of a run: one line a logged step, without doubles whatever was killed when."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossgate.errors import writing


class MetricsFile:
    """Appends to `metrics.jsonl`. Values that are not finite become null, so that every line is valid JSON."""

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        """Opens the file and drops what an earlier start had logged after the step that it is resumed from."""
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resume_step]
        partial = self._path.with_name(".metrics.jsonl.partial")
        with writing("the metrics", self._path):
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self._path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line.

        Raises:
            UserError: for a disk that is full.
        """
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with writing("a line of metrics", self._path), self._path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`; a line that a kill cut short is left out."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
