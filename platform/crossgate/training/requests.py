"""What others ask of a run in progress: save and go on, or save and stop. Asked by any thread, heeded between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SAVE, STOP = 1, 2


class Preempted(SystemExit):
    """The run was asked to stop and has saved; starting it again goes on."""


class Requests:
    """The requests to this process's rank."""

    def __init__(self) -> None:
        self._stop, self._save, self._saved = threading.Event(), threading.Event(), threading.Event()
        self.status = 128 + signal.SIGTERM
        """What a process ends with that was asked to stop."""

    def ask_to_stop(self, signum: int = signal.SIGTERM) -> None:
        """Asks the run to save and stop, in the name of a signal."""
        if not self._stop.is_set():
            self.status = 128 + signum
        self._stop.set()

    def ask_to_save(self) -> None:
        """Asks the run to save and go on."""
        self._saved.clear()
        self._save.set()

    def take(self) -> int:
        """Returns what is asked: 0, `SAVE` or `STOP`. A request to save is handed out once."""
        if self._stop.is_set():
            return STOP
        if not self._save.is_set():
            return 0
        self._save.clear()  # only now: another thread may ask at any moment
        return SAVE

    def heeded(self) -> None:
        """Notes that the run has saved."""
        self._saved.set()

    def saved(self) -> bool:
        """Whether the run has saved since it was last asked to."""
        return self._saved.is_set()

    def begin(self) -> None:
        """Forgets what was asked of an earlier run in this process."""
        for event in (self._stop, self._save, self._saved):
            event.clear()


REQUESTS = Requests()
"""Of the run in this process: signal handlers and threads of others know no other way to it."""


@contextmanager
def heeding_signals() -> Iterator[Requests]:
    """Gives the process's requests, among which SIGTERM and a first Ctrl-C count as one to stop.

    A second Ctrl-C is not waited for. Where this is not the main thread (Ray's training threads) no handler can be set,
    and whoever owns that one does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield REQUESTS
        return
    REQUESTS.begin()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    impatient = before[signal.SIGINT]

    def interrupted(number: int, _: object) -> None:
        REQUESTS.ask_to_stop(number)
        signal.signal(signal.SIGINT, impatient)

    signal.signal(signal.SIGTERM, lambda *_: REQUESTS.ask_to_stop())
    if callable(impatient):  # not where a shell had it ignored, as it does for what runs in the background
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield REQUESTS
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
