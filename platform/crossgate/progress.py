"""One way to show progress: a live bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[int, int], None]


@contextmanager
def progress_bar(unit: str, *, every_s: float = 10.0) -> Iterator[Step]:
    """Gives a function ``step(done, total)`` that shows how far a long job is, its rate and its ETA."""
    if sys.stderr.isatty():
        with _live_bar(unit) as step:
            yield step
    else:
        yield _plain_lines(unit, every_s)


@contextmanager
def _live_bar(unit: str) -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(unit, total=None, rate="")
        started = time.monotonic()

        def step(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-6)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} {unit}/s")

        yield step


def _plain_lines(unit: str, every_s: float) -> Step:
    started = time.monotonic()
    last, shown = -every_s, -1

    def step(done: int, total: int) -> None:
        nonlocal last, shown
        elapsed = time.monotonic() - started
        if done == shown or (elapsed - last < every_s and done < total):
            return
        last, shown = elapsed, done
        rate = done / max(elapsed, 1e-6)
        pace = f"  {rate:.1f} {unit}/s  ETA {(total - done) / rate:.0f} s" if done else ""
        print(f"{done}/{total} {unit}{pace}", file=sys.stderr, flush=True)

    return step
