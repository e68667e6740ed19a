"""The picture of what every rank did in the steps that a run traced."""

from __future__ import annotations

from pathlib import Path

from crossgate.errors import writing
from crossgate.evaluation.steps import step_timeline
from crossgate.evaluation.style import png
from crossgate.training.trace import FOLDER, read_traces


def trace_picture(run_dir: Path, out: Path | None = None) -> Path:
    """Draws the traces of a run (default: into ``trace/timeline.png`` of it) and returns the picture's path.

    Raises:
        UserError: where there are none, or the picture cannot be written.
    """
    ranks = read_traces(run_dir)
    path = out or run_dir / FOLDER / "timeline.png"
    with writing("the picture", path):
        path.write_bytes(png(step_timeline(ranks)))
    return path
