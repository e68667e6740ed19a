"""torch's profiler over some steps of a rank, as a file for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from crossgate.errors import writing


class StepProfile:
    """Records the steps asked for; a context manager around all of them, which keeps nothing of what an error ends.

    Args:
        steps: first and last of them, or None for none.
        path: of the trace, ``.json.gz``.
    """

    def __init__(self, steps: tuple[int, int] | None, path: Path) -> None:
        self._steps, self._path = steps or (0, 0), path
        self._running: Any = None
        self._phase: Any = None

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running and error is None:
            self._save()
        elif self._running:
            self._stop()

    def enter(self, phase: str, step: int) -> None:
        """Notes that a phase begins, which the trace shows as a bar over what happens in it."""
        first, last = self._steps
        if not self._running and first <= step <= last and phase == "load":
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profile(activities=activities)
            self._running.start()
        elif self._running and step > last:
            self._save()
        if self._running:
            self._end_phase()
            self._phase = record_function(phase)
            self._phase.__enter__()

    def _save(self) -> None:
        running = self._stop()
        with writing("a profile", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self._path))

    def _stop(self) -> Any:
        self._end_phase()
        running, self._running = self._running, None
        running.stop()
        return running

    def _end_phase(self) -> None:
        if self._phase:
            self._phase.__exit__(None, None, None)
            self._phase = None
