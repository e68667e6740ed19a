"""What the ranks did in some steps: a row a rank, a bar a phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from crossgate.evaluation.style import INK, SEQUENCE, new, styled

MOST_RANKS = 64


@styled
def step_timeline(ranks: Mapping[int, Sequence[Any]]) -> Figure:
    """Draws spans, each with ``phase``, ``step``, ``start`` and ``seconds``, of up to 64 ranks.

    A row that is mostly `load` waits for clips; rows whose bars begin late wait for the slowest one.

    Args:
        ranks: rank -> its spans in order.
    """
    shown = sorted(ranks)[:MOST_RANKS]
    begin = min(span.start for rank in shown for span in ranks[rank])
    phases = list(dict.fromkeys(span.phase for rank in shown for span in ranks[rank]))
    figure, (axes,) = new(1.3 + 0.28 * len(shown), width=11)
    for row, rank in enumerate(shown):
        bars = [(span.start - begin, span.seconds) for span in ranks[rank]]
        colours = [SEQUENCE[phases.index(span.phase) % len(SEQUENCE)] for span in ranks[rank]]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colours)
    firsts = {span.step: span.start - begin for span in reversed(ranks[shown[0]])}
    for step, start in firsts.items():
        axes.axvline(start, color=INK, linewidth=0.5)
        axes.annotate(f" {step}", (start, 1), xycoords=("data", "axes fraction"), va="bottom")
    axes.set_yticks(range(len(shown)), [f"rank {rank}" for rank in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds; above: the step that begins on the first rank")
    handles = [Patch(color=SEQUENCE[n % len(SEQUENCE)], label=phase) for n, phase in enumerate(phases)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(phases))
    return figure
