"""Tables of strings, and the few ways in which numbers are worded, alike in terminal and report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from crossgate.evaluation.intervals import Difference, Interval


@dataclass
class Table:
    """Rows of cells under column names; columns of numbers are aligned to the right.

    Attributes:
        columns: names.
        rows: one string a column.
        caption: one sentence that says what the rows are.
    """

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    caption: str = ""

    def numeric(self, column: int) -> bool:
        """Whether every cell of the column starts like a number or is empty."""
        cells = [row[column].lstrip("+-\u2212< ") for row in self.rows]
        return bool(self.rows) and all(not cell or cell[0].isdigit() or cell == "n/a" for cell in cells)

    def text(self) -> str:
        """Plain text with aligned columns, for a terminal."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        right = [self.numeric(i) for i in range(len(self.columns))]
        lines = [
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip() for row in cells
        ]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def percent(value: float, digits: int = 1) -> str:
    """``0.612`` -> ``61.2 %``."""
    return "n/a" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def number(value: float, digits: int = 3) -> str:
    """A plain number, or n/a."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def bounds(interval: Interval, as_percent: bool = True, digits: int | None = None) -> str:
    """The interval alone: ``55.0 to 67.1``."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return "n/a"
    scale, digits = (100, 1 if digits is None else digits) if as_percent else (1, 3 if digits is None else digits)
    return f"{scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f}"


def points(difference: Difference) -> str:
    """A difference of shares in percentage points with its sign: ``+3.1 (-0.4 to +6.7)``."""
    if math.isnan(difference.value):
        return "n/a"
    value = f"{100 * difference.value:+.1f}"
    if math.isnan(difference.low):
        return value
    return f"{value} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def verdict(interval: Interval, chance: float) -> str:
    """Where the interval lies, as the end of a sentence about it."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return "there are too few groups for an interval"
    if interval.low > chance:
        return "the whole interval lies above chance"
    return "the whole interval lies below chance" if interval.high < chance else "the interval includes chance"


def p_value(p: float) -> str:
    """Three decimals, or ``<0.001``."""
    return "n/a" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"
