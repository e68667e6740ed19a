"""What others ask of a run in progress: save and go on, or save and stop. Asked by any thread, heeded between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SAVE, STOP = 1, 2


class Requests:
    """The requests to this process's rank."""

    def __init__(self) -> None:
        self._stop, self._save, self._saved = threading.Event(), threading.Event(), threading.Event()

    def ask_to_stop(self) -> None:
        """Asks the run to save and stop."""
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
def heeding_sigterm() -> Iterator[Requests]:
    """Gives the process's requests, among which SIGTERM counts as one to stop.

    Where this is not the main thread (Ray's training threads) no handler can be set, and whoever owns that one does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield REQUESTS
        return
    REQUESTS.begin()
    before = signal.signal(signal.SIGTERM, lambda *_: REQUESTS.ask_to_stop())
    try:
        yield REQUESTS
    finally:
        signal.signal(signal.SIGTERM, before)
