"""The progress line of a run: live on a terminal, a plain line in a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class ProgressLine:
    """Shows where a run stands. Silent on every rank but the first."""

    def __init__(self, name: str, total: int, *, enabled: bool = True) -> None:
        self._name, self._total, self._enabled = name, total, enabled
        self._live: Progress | None = None

    def __enter__(self) -> ProgressLine:
        if self._enabled and sys.stderr.isatty():
            columns = TextColumn("[bold]{task.fields[name]}"), BarColumn(bar_width=24), TextColumn("{task.description}")
            self._live = Progress(*columns, console=Console(stderr=True))
            self._task = self._live.add_task("starting", total=self._total, name=self._name)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, message: str) -> None:
        """Shows a sentence of its own, above the bar."""
        if self._live:
            self._live.console.print(message, highlight=False)
        elif self._enabled:
            print(f"{self._name}: {message}", file=sys.stderr, flush=True)

    def show(self, step: int, metrics: Mapping[str, float], eta_s: float) -> None:
        """Shows the state after a step."""
        line = describe(step, self._total, metrics, eta_s)
        if self._live:
            self._live.update(self._task, completed=step, description=line)
        elif self._enabled:
            print(f"{self._name}: {line}", file=sys.stderr, flush=True)


def describe(step: int, total: int, metrics: Mapping[str, float], eta_s: float) -> str:
    """Returns the line: step, loss, clips/s, data-wait, MFU, memory, time left. No number is made up."""
    mfu = metrics.get("throughput/mfu_pct")
    memory = metrics.get("memory/gpu_peak_gib", metrics.get("memory/host_gib", 0.0))
    return " | ".join(
        (
            f"step {step}/{total} ({100 * step / total:.0f} %)",
            f"loss {metrics['train/loss']:.4f}",
            f"{metrics['throughput/clips_per_s']:.1f} clips/s",
            f"data-wait {metrics['time/data_wait_pct']:.0f} %",
            f"MFU {mfu:.1f} %" if mfu is not None else "MFU not measurable here",
            f"{memory:.2f} GiB",
            f"ETA {duration(eta_s)}",
        )
    )


def duration(seconds: float) -> str:
    """Returns ``1:02:03`` or ``2:03``; a question mark for a time that is not known."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
