"""What an evaluation hands on: metrics, figures, sections of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from crossgate.evaluation.intervals import Interval
from crossgate.evaluation.report import Section

Drawn = tuple[str, Figure, str]
"""File stem, figure, and one sentence on how to read it."""


@dataclass
class Evaluation:
    """What an evaluation hands on.

    Attributes:
        metrics: flat names -> floats, for `write_results` and the tracker.
        figures: file stem -> figure.
        sections: of the report, holding the same figures.
        summary: the result in a sentence or two.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    summary: str = ""

    def add(self, section: Section, *drawn: Drawn) -> None:
        """Adds a section with its figures."""
        for stem, figure, caption in drawn:
            self.figures[stem] = figure
            section.figures.append((figure, caption))
        self.sections.append(section)

    def put(self, name: str, interval: Interval) -> None:
        """Adds a metric with its interval."""
        self.metrics.update({k: v for k, v in interval.metrics(name).items() if not math.isnan(v)})
