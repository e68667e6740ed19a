"""What an evaluation hands on: metrics, figures, sections of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from crossgate.evaluation.intervals import Interval
from crossgate.evaluation.report import Section


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

    def add(self, section: Section, *drawn: tuple[str, Figure, str]) -> None:
        """Adds a section with figures given as (file stem, figure, how to read it)."""
        for stem, figure, caption in drawn:
            self.figures[stem] = figure
            section.figures.append((figure, caption))
        self.sections.append(section)

    def put(self, name: str, interval: Interval) -> None:
        """Adds a metric with its interval."""
        self.metrics.update({k: v for k, v in interval.metrics(name).items() if not math.isnan(v)})
