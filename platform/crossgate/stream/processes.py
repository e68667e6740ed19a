"""How worker processes are started."""

from __future__ import annotations

import multiprocessing
from typing import Any


def worker_context() -> Any:
    """Returns the context for worker processes: they come from a clean server process that has crossgate loaded.

    Forking this process instead would copy its locks, threads and sockets: s3fs breaks in the children, and in the
    parent too. The server keeps the environment of its start; hand `environment.snapshot()` to what runs there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crossgate.stream.loader"])
    return context
