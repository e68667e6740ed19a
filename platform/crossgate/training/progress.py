"""The progress line of a run: live on a terminal, a plain line in a log or in a file of its own."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger("crossgate.training")


class ProgressLine:
    """Shows where a run stands. Silent on every rank but the first.

    Args:
        name, total: of the run, and its number of steps.
        enabled: whether this rank is the first.
        log: file that takes the lines instead of the terminal, which has other things to show. Where it takes none, one
            warning says so and the run goes on.
    """

    def __init__(self, name: str, total: int, *, enabled: bool = True, log: Path | None = None) -> None:
        self._name, self._total, self._enabled, self._log = name, total, enabled, log
        self._live: Progress | None = None
        self._complained = False

    def __enter__(self) -> ProgressLine:
        if self._enabled and not self._log and sys.stderr.isatty():
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
        else:
            self._write(message)

    def show(self, step: int, metrics: Mapping[str, float], eta_s: float) -> None:
        """Shows the state after a step."""
        line = describe(step, self._total, metrics, eta_s)
        if self._live:
            self._live.update(self._task, completed=step, description=line)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        if not self._enabled:
            return
        if self._log is None:
            print(f"{self._name}: {line}", file=sys.stderr, flush=True)
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%F %T')} {line}\n")
        except OSError as error:  # a full disk stops the checkpoints loudly; a line is no reason to
            if not self._complained:
                log.warning("%s takes no more lines (%s)", self._log, error.strerror or error)
            self._complained = True


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
