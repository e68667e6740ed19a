"""One quiet look for every figure: colour-blind safe colours, one fixed colour a modality, no global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crossgate.modality import MODALITIES

P = ParamSpec("P")

INK, MUTED, LINE = "#24292f", "#6e7781", "#d0d7de"
ACCENT, REFERENCE = "#0072b2", "#999999"
# Okabe and Ito's palette: told apart with any colour vision, and in grey by their order of lightness.
_PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6f00", "#5b5b5b")
SEQUENCE = _PALETTE
SHADES = "Blues"
WIDTH = 7.4  # inches: the text column of the report

_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a label may hold a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "crossgate",  # the same figure is the same file
}

# The report shows SVGs as images, which follow the reader's colour scheme by themselves.
_DARK = (
    "<style>@media (prefers-color-scheme: dark) {"
    f'[style*="fill: {INK}"] {{ fill: #e6edf3 !important }}'
    f'[style*="stroke: {INK}"] {{ stroke: #e6edf3 !important }}'
    f'[style*="fill: {MUTED}"] {{ fill: #9198a1 !important }}'
    f'[style*="stroke: {MUTED}"] {{ stroke: #9198a1 !important }}'
    f'[style*="stroke: {LINE}"] {{ stroke: #3d444d !important }}'
    "}</style>"
)


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorates a function that draws a figure, so that it draws in this style."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new(height: float, columns: int = 1, width: float = WIDTH, **options: Any) -> tuple[Figure, list[Axes]]:
    """Returns a figure without pyplot (nothing to close), and its axes from left to right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def colour(modality: str) -> str:
    """The modality's colour; names that are no modality get one by their spelling."""
    names = list(MODALITIES)
    place = names.index(modality) if modality in MODALITIES else len(names) + sum(map(ord, modality))
    return _PALETTE[place % len(_PALETTE)]


def short(label: object, limit: int = 26) -> str:
    """A label on one line, at most `limit` characters."""
    text = " ".join(str(label).split())
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def svg(figure: Figure) -> str:
    """The figure as SVG text that follows the reader's light or dark scheme."""
    text = _save(figure, "svg").decode()
    start = text.index("<svg")
    body = text.index(">", start) + 1
    return text[start:body] + _DARK + text[body:]


def png(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as PNG on white."""
    return _save(figure, "png", dpi=dpi, facecolor="white")


def _save(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a label in a script that the font lacks
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    return buffer.getvalue()
