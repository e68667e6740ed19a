"""Whole shards of a remote store on a local disk, shared by all processes of a machine.

Nobody waits for the cache: a clip comes from it when its shard is there, else by range from the store, while a thread
fetches the shard. Files are named by content, appear by renaming, and are safe to delete at any moment.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crossgate.errors import UserError
from crossgate.stream.sidecar import ANEW
from crossgate.stream.storage import PIECE, Store

RESERVE = 1 << 30
"""Bytes of the disk that are left to others, checkpoints for instance."""
IN_USE = 60.0
"""Seconds after its last use before a shard makes room for another: else a small cache would only churn."""
AGAIN = 10.0
"""Seconds before a shard that could not be kept is tried again."""

_AT_ONCE = 4 * PIECE
_TOUCH = 5.0
_PARTIAL = ".partial"


class ShardChanged(UserError):
    """A shard is not the one that was indexed."""

    def __init__(self, where: str, how: str) -> None:
        super().__init__(
            f"the shard changed since it was indexed: {how}",
            where=where,
            cure=f"run crossgate check; {ANEW}",
        )


@dataclass(frozen=True)
class RemoteShard:
    """A shard to keep: where it is, and what the index says of its bytes.

    Attributes:
        store, name: where it is.
        bytes: its length.
        sha256: of its bytes, empty where the index does not know it.
        identity: what else tells it from other content, where there is no digest.
    """

    store: Store
    name: str
    bytes: int
    sha256: str
    identity: str = ""

    @property
    def key(self) -> str:
        """File name in the cache: the same content has the same name, whatever its URL."""
        if self.sha256:
            return f"{self.sha256}.tar"
        text = f"{self.store.path(self.name)}\0{self.bytes}\0{self.identity}"
        return f"{hashlib.sha256(text.encode()).hexdigest()}.tar"


class ShardCache:
    """One process's door to a cache folder.

    Args:
        folder: on a local disk; made if need be.
        limit: bytes that the folder may take.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self.fetched = 0
        """Bytes that this process has fetched into the folder."""
        self.notes: list[str] = []
        """What the user should be told, each thing once."""
        self._off = False
        self._touched: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._wanted: queue.SimpleQueue[RemoteShard | None] = queue.SimpleQueue()
        self._changed: ShardChanged | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- reading -----------------------------------------------------------------------------------------------

    def read(self, shard: RemoteShard, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Returns ranges ``(start, end)`` of a shard, or None when it is not here.

        Files are not kept open: one that was removed would keep its place on the disk.
        """
        path = self.folder / shard.key
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = [os.pread(file, end - start, start) for start, end in ranges]
        except OSError:
            return None
        finally:
            os.close(file)
        if any(len(data) != end - start for data, (start, end) in zip(found, ranges)):
            path.unlink(missing_ok=True)
            return None
        now = time.monotonic()
        if now - self._touched.get(shard.key, -_TOUCH) >= _TOUCH:
            self._touched[shard.key] = now
            with suppress(OSError):
                os.utime(path)
        return found

    # ---- adding ------------------------------------------------------------------------------------------------

    def want(self, shard: RemoteShard) -> None:
        """Asks for a shard to be fetched in the background.

        Raises:
            ShardChanged: when a shard that was fetched before is not the one that was indexed.
        """
        if self._changed is not None:
            raise self._changed
        if self._off or self._closed.is_set() or time.monotonic() < self._not_before.get(shard.key, 0.0):
            return
        self._not_before[shard.key] = float("inf")  # until the thread has dealt with it
        self._wanted.put(shard)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="shard-cache", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the background thread."""
        self._closed.set()
        self._wanted.put(None)
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def add(self, shard: RemoteShard) -> bool:
        """Fetches a shard, unless it is here, another process is at it, or there is no room for it.

        Returns:
            whether it is here now.

        Raises:
            ShardChanged: when it is not the one that was indexed.
            UserError: when the store fails.
        """
        final = self.folder / shard.key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if final.exists():
                return True
            with _claimed(final.with_suffix(_PARTIAL)) as file:
                if file is not None and self._reserve(file, shard.bytes):
                    self._fetch(shard, file)
                    os.fsync(file)
                    os.replace(final.with_suffix(_PARTIAL), final)
        except _Closed:
            return False
        except OSError as error:
            self._off = True
            self._note(f"{self.folder}: no more shards are kept here ({error.strerror or error}); reading on without")
            return False
        return final.exists()

    def _serve(self) -> None:
        while (shard := self._wanted.get()) is not None and not self._closed.is_set():
            try:
                self.add(shard)
            except ShardChanged as error:
                self._changed = error
            except UserError:  # of the store: whoever reads clips from it meets it too, and can tell the user
                pass
            self._not_before[shard.key] = time.monotonic() + AGAIN

    def _fetch(self, shard: RemoteShard, file: int) -> None:
        for _ in range(2):  # once more, in case it broke on its way
            digest = hashlib.sha256()
            with os.fdopen(file, "r+b", closefd=False) as out:
                for start in range(0, shard.bytes, _AT_ONCE):
                    if self._closed.is_set():
                        raise _Closed
                    data = shard.store.read_range(shard.name, start, min(start + _AT_ONCE, shard.bytes))
                    out.write(data)
                    digest.update(data)
                    self.fetched += len(data)
            if shard.sha256 in ("", digest.hexdigest()):
                return
        raise ShardChanged(shard.store.path(shard.name), "its SHA-256 is not the indexed one")

    # ---- room --------------------------------------------------------------------------------------------------

    def _reserve(self, file: int, size: int) -> bool:
        """Makes room for a file of this size and takes it; says whether there is any.

        Raises:
            OSError: when the disk is full of other things.
        """
        if size > self.limit:
            self._note(f"{self.folder}: data.cache.size_gb is less than one shard ({size} bytes); reading without it")
            return False
        os.ftruncate(file, 0)
        with _locked(self.folder / ".lock"):
            kept, taken = self._survey()
            free = shutil.disk_usage(self.folder).free - RESERVE
            while taken + size > self.limit or free < size:
                if not kept or time.time() - kept[0].used < IN_USE:
                    break
                oldest = kept.pop(0)
                oldest.path.unlink(missing_ok=True)
                taken, free = taken - oldest.size, free + oldest.size
            if taken + size > self.limit:
                self._note(f"{self.folder}: the shards in use at once exceed data.cache.size_gb; some are not kept")
                return False
            if free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(file, 0, size)  # taken now, so that the next one counts it
        return True

    def _survey(self) -> tuple[list[_Kept], int]:
        """Returns the whole shards, least recently used first, and the bytes that everything takes."""
        kept, taken = [], 0
        for entry in os.scandir(self.folder):
            try:
                about = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.endswith(_PARTIAL) and _discarded_if_dead(Path(entry.path)):
                continue
            taken += about.st_size
            if entry.name.endswith(".tar"):
                kept.append(_Kept(about.st_mtime, about.st_size, Path(entry.path)))
        return sorted(kept), taken

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class _Kept(NamedTuple):
    used: float
    size: int
    path: Path


class _Closed(Exception):
    """The cache was closed while a shard was being fetched."""


@contextmanager
def _claimed(path: Path) -> Iterator[int | None]:
    """Gives a file that this process alone may write, or None when another one does; not renamed, it goes again."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _mine(file, path):
            yield None
            return
        try:
            yield file
        finally:
            if _is(file, path):
                path.unlink()
    finally:
        os.close(file)


def _discarded_if_dead(path: Path) -> bool:
    """Removes what a killed process left half fetched: the kernel has let go of its lock."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if _mine(file, path):
            path.unlink()
            return True
        return False
    finally:
        os.close(file)


def _mine(file: int, path: Path) -> bool:
    """Locks a file without waiting; one that was renamed or removed meanwhile is nobody's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is(file, path)


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
