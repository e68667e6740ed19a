"""One start of a run at a time: a second one would delete and overwrite what the first is writing.

The lock is the operating system's, on a file in the run's folder. It ends with the process that holds it, however that
ends, and reaches as far as the folder's file system keeps locks (NFS and most cluster file systems do).
"""

from __future__ import annotations

import datetime
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from crossgate.errors import UserError
from crossgate.training.world import World

PATIENCE_S = 20.0
"""A killed start's process may take that long to be gone when Ray has already made the next one."""
_LOCK, _OWNER = ".lock", ".owner"
_OPENING = {_LOCK, _OWNER, "tracking"}


@contextmanager
def only_start(directory: Path, world: World | None = None) -> Iterator[None]:
    """Holds the run's folder for this start. Every rank calls it; rank 0 holds it.

    Args:
        directory: of the run; exists.
        world: the ranks (None: a process that trains nothing itself, as a search's).

    Raises:
        UserError: on every rank, when another start of the run goes on.
    """
    lock = FileLock(directory / _LOCK, timeout=PATIENCE_S)
    holds = world is None or world.leads
    owner = _held(lock, directory) if holds else None
    if world is not None:
        owner = world.from_leader(owner)
    if owner is not None:
        raise UserError(
            f"this run is going on already ({owner})",
            where=directory,
            cure="wait for its end or stop it; set run.name for another run",
        )
    try:
        yield
    finally:
        if holds:
            lock.release()


@contextmanager
def nothing_left_of_a_refusal(directory: Path, world: World) -> Iterator[None]:
    """Deletes the run's folder when this start is refused and there is nothing in it but the marks of its opening.

    Goes inside `only_start` and around the tracker, so that nobody else writes there. A folder in which any start
    trained has a recipe, and is kept with its journal.

    Args:
        directory: of the run.
        world: the ranks; rank 0 deletes.
    """
    try:
        yield
    except UserError:
        if world.leads and directory.is_dir() and {path.name for path in directory.iterdir()} <= _OPENING:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _held(lock: FileLock, directory: Path) -> str | None:
    """Takes the lock; returns who has it where that fails."""
    note = directory / _OWNER
    try:
        lock.acquire()
    except Timeout:
        return note.read_text() if note.exists() else "by an unknown process"
    except OSError:  # a file system without locks: the run must not fail for it
        return None
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    note.write_text(f"on {socket.gethostname()}, process {os.getpid()}, since {since}")
    return None
