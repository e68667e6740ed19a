"""A run that hangs says where, and ends: every rank's phase and the stacks of all its threads, then a failure.

A rank that waits for ever, in a collective that another one never joins or for a clip that never comes, looks like one
that works. Nobody outside can tell, so every rank watches itself.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from torch import nn

from crossgate.training.world import World

Phase = Literal["load", "forward", "backward", "step", "log", "validate", "save"]
EXIT_STUCK = 75
"""How a process ends that hung: EX_TEMPFAIL of sysexits.h, "try again". Ray and torchrun start such a run anew."""
_STDERR = 2
_PATIENCE_S = 30.0  # with the report of a rank that came into its phase a step's time later


class Watchdog:
    """Ends this process when its rank has been in one phase for too long; a context manager around the steps.

    Each rank writes what it was doing and its stacks into the folder, waits a moment for the others to do the same,
    and the first of them says it all in one line. A thread does so; where none can run, since C code never gives the
    interpreter back, the interpreter's own timer prints the stacks and ends the process. The next start keeps the
    reports as `rank-00000.before.txt`.

    Args:
        timeout_s: longest time in a phase, in seconds; 0 watches nothing.
        folder: of the reports, seen by all ranks.
        world: the ranks.
    """

    def __init__(self, timeout_s: float, folder: Path, world: World) -> None:
        self._timeout, self._folder, self._world = timeout_s, folder, world
        self._now: tuple[str, int, float] = ("start", 0, time.monotonic())  # one tuple: threads see all of it or none
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout:
            with suppress(FileNotFoundError):  # what an earlier start reported must not pass for this one's
                self._report().replace(self._report().with_suffix(".before.txt"))
            self.beat()
            self._wind_up()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._timeout:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def enter(self, phase: Phase, step: int) -> None:
        """Notes that the rank begins a phase of a step; costs a clock's reading."""
        self._now = phase, step, time.monotonic()

    def beat(self) -> None:
        """Notes that the phase gets on."""
        self._now = *self._now[:2], time.monotonic()

    @contextmanager
    def beating(self, module: nn.Module) -> Iterator[None]:
        """Within, each use of one of the module's parts is a beat: a validation may be long, but not stand still."""
        handles = [child.register_forward_pre_hook(lambda *_: self.beat()) for child in module.children()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- in the thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        look = min(1.0, self._timeout / 4)
        while not self._over.wait(look):
            self._wind_up()
            phase, step, since = self._now
            if time.monotonic() - since > self._timeout:
                self._end(f"rank {self._world.rank}: {phase} of step {step}, for {time.monotonic() - since:.0f} s")

    def _wind_up(self) -> None:
        """Starts the interpreter's timer anew: it goes off when the thread gets no turn any more."""
        faulthandler.dump_traceback_later(self._timeout + 2 * _PATIENCE_S, exit=True, file=_STDERR)

    def _end(self, standing: str) -> None:
        try:
            self._write(standing)
            said = self._all()
            if min(said) == self._world.rank:
                missing = [str(rank) for rank in range(self._world.ranks) if rank not in said]
                silent = [f"rank {', '.join(missing)}: silent"] if missing else []
                print(
                    f"crossgate: the run hangs and ends, to be started again: {'; '.join([*said.values(), *silent])}; "
                    f"the stacks are in {self._folder}",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            os._exit(EXIT_STUCK)

    def _report(self, rank: int | None = None) -> Path:
        return self._folder / f"rank-{self._world.rank if rank is None else rank:05d}.txt"

    def _write(self, standing: str) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [standing]
        for ident, frame in sys._current_frames().items():
            lines += ["", f"Thread {names.get(ident, ident)}:", "".join(traceback.format_stack(frame)).rstrip()]
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._report().with_suffix(".partial")
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(self._report())

    def _all(self) -> dict[int, str]:
        """Returns rank -> where it stands, after waiting for those that have not said so yet."""
        until = time.monotonic() + min(_PATIENCE_S, self._timeout)
        said: dict[int, str] = {}
        while True:
            for rank in range(self._world.ranks):
                if rank not in said and self._report(rank).exists():
                    said[rank] = self._report(rank).read_text().splitlines()[0]
            if len(said) == self._world.ranks or time.monotonic() > until:
                return dict(sorted(said.items()))
            time.sleep(0.05)
