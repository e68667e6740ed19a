"""Killing a process with all that it started, as a machine that loses power does."""

from __future__ import annotations

from contextlib import suppress

import psutil


def kill_family(pid: int) -> None:
    """Kills a process and its descendants at once, those first, and waits until they are gone."""
    family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    for one in family:
        with suppress(psutil.NoSuchProcess):  # some end by themselves meanwhile
            one.kill()
    psutil.wait_procs(family, timeout=20)
