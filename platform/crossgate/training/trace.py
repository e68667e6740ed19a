"""When each phase of some steps began on a rank and how long it took: a file of JSON lines a rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

from crossgate.errors import UserError, writing

FOLDER = "trace"


class Span(NamedTuple):
    """A phase of a step: seconds since 1970 when it began, and seconds that it took."""

    phase: str
    step: int
    start: float
    seconds: float


class StepTrace:
    """Notes the phases of the steps asked for; a context manager around all of them, which keeps what an error ends.

    A phase ends where the next begins. Where a GPU works behind the host, it is the host's time that is told.

    Args:
        steps: first and last of them, or None for none.
        run_dir: of the run; the file is ``trace/rank-00000.jsonl`` there.
        rank: of this process.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, rank: int) -> None:
        self._first, self._last = steps or (1, 0)
        self._path = run_dir / FOLDER / f"rank-{rank:05d}.jsonl"
        self._spans: list[Span] = []
        self._now: tuple[str, int, float] | None = None

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(time.time())
        self._save()

    def enter(self, phase: str, step: int) -> None:
        """Notes that a phase begins; costs a clock's reading."""
        now = time.time()
        self._end(now)
        if self._first <= step <= self._last:
            self._now = phase, step, now
        elif step > self._last:
            self._save()

    def _end(self, now: float) -> None:
        if self._now:
            phase, step, start = self._now
            self._spans.append(Span(phase, step, start, now - start))
            self._now = None

    def _save(self) -> None:
        if not self._spans:
            return
        with writing("a trace", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(json.dumps(span._asdict()) + "\n" for span in self._spans))
        self._spans = []


def read_traces(run_dir: Path) -> dict[int, list[Span]]:
    """Returns rank -> its spans in order.

    Raises:
        UserError: where there is no such run, or it left none.
    """
    if not run_dir.is_dir():
        raise UserError("no such run", where=run_dir, expected="the directory of a run, such as runs/NAME")
    found = {
        int(path.stem.removeprefix("rank-")): [Span(**json.loads(line)) for line in path.read_text().splitlines()]
        for path in sorted((run_dir / FOLDER).glob("rank-*.jsonl"))
    }
    if not found:
        raise UserError("no trace of any step", where=str(run_dir), cure="train with training.trace=[100,105]")
    return found
