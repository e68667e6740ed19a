"""Checkpoints that travel to a store while training goes on, and come back where the run's own folder has none.

In the store every checkpoint is some files with a common beginning, `step-00000120.manifest.json` among them. That one
is written last and deleted first: what has it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from crossgate.errors import Unreachable, UserError, writing
from crossgate.stream.storage import Store, open_store

MANIFEST = "manifest.json"
_APART = "--"  # for the slash of a file's path: stores are listed folder by folder
_PIECE = 64 << 20
_LOOK_S, _TELL_S = 5.0, 60.0
GRACE_S = 15.0
"""Seconds that a run which is to stop leaves its upload: half of what Kubernetes gives a pod."""


def checkpoint_store(url: str, run: str) -> Store | None:
    """Returns the folder of a run's checkpoints below the recipe's `training.checkpoint_url`, if it has one.

    Raises:
        UserError: for a store that takes no files.
    """
    if url.startswith(("http://", "https://")):
        raise UserError("http stores are read only", where="training.checkpoint_url", expected="a path or s3:// URL")
    return open_store(f"{url.rstrip('/')}/{run}") if url else None


def refuse_unwritable(store: Store) -> None:
    """Tries the store before a run whose checkpoints it could never take; one that is down may take them later.

    Raises:
        UserError: when it refuses to take a file.
    """
    try:
        store.probe()
    except Unreachable:
        return
    except UserError as error:
        raise UserError(
            f"it takes no checkpoints ({error.what})", where=f"training.checkpoint_url, {store.url}", cure=error.cure
        ) from None


class Uploader:
    """Uploads checkpoints of the run's folder from a thread of its own; a failure is said and survived.

    Where saving is faster than the way to the store, only the newest checkpoint sets out, and the best.

    Args:
        store: of `checkpoint_store`.
        say: tells the user something.
    """

    def __init__(self, store: Store, say: Callable[[str], None]) -> None:
        self._store, self._say = store, say
        self._jobs: queue.Queue[tuple[Path, frozenset[str] | None] | None] = queue.Queue()
        self._wanted: set[str] = set()
        self.travelling = ""
        """Name of the checkpoint under way, which must stay in its folder."""
        self.uploaded = ""
        """Name of the newest checkpoint that this process has brought there whole."""
        self.failures = 0
        self._ending: float | None = None
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def put(self, path: Path, keep: Collection[str], best: str = "") -> None:
        """Has a checkpoint uploaded and, once it is there, all but it and those of the given names deleted.

        What waits for its turn is left out, unless it is the best one of the given name.
        """
        self._wanted = {path.name, best}
        self._jobs.put((path, frozenset(keep) | {path.name}))

    def catch_up(self, path: Path) -> None:
        """Has a checkpoint of an earlier start uploaded, unless it arrived then."""
        self._wanted.add(path.name)
        self._jobs.put((path, None))

    def finish(self) -> None:
        """Waits for what is under way."""
        while not self.over():
            pass

    def over(self, until: float = math.inf) -> bool:
        """Takes on nothing more, waits some seconds for what is under way, and says whether to wait no longer.

        Args:
            until: on the monotonic clock, when what has not arrived is left to the run's next start.
        """
        if self._ending is None:
            self._ending = time.monotonic()
            self._jobs.put(None)
        self._thread.join(max(0.0, min(_LOOK_S, until - time.monotonic())))
        if not self._thread.is_alive():
            return True
        now = time.monotonic()
        if now >= until:
            self._say(f"{self.travelling} is still on its way to {self._store.url}: the next start brings it there")
        elif now - self._ending >= _TELL_S:
            self._ending = now
            self._say(f"waiting for {self.travelling} to arrive at {self._store.url}")
        return now >= until

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            path, keep = job
            if path.name not in self._wanted:
                continue
            self.travelling = path.name
            try:
                if keep is not None:
                    self._upload(path)
                    self._prune(keep)
                elif path.name not in stored_checkpoints(self._store):
                    self._upload(path)
            except Exception as error:  # whatever it was, later checkpoints still find this thread alive
                self.failures += 1
                self._say(f"{path.name} was not uploaded; the next one, or the next start, is tried: {error}")
            self.travelling = ""

    def _upload(self, path: Path) -> None:
        described = (path / MANIFEST).read_bytes()
        for name in sorted(json.loads(described)["files"]):
            self._store.put(stored_name(path.name, name), path / name)
        self._store.put(stored_name(path.name, MANIFEST), described)
        self.uploaded = path.name

    def _prune(self, keep: Collection[str]) -> None:
        gone = [name for name in self._store.list() if name.split(".", 1)[0] not in keep]
        for name in sorted(gone, key=lambda name: not name.endswith(f".{MANIFEST}")):
            self._store.delete(name)


def stored_checkpoints(store: Store) -> list[str]:
    """Returns the names of the whole checkpoints in a store, oldest first; none where there is no such folder.

    Raises:
        UserError: for a store that cannot be read.
    """
    if store.local and not Path(store.url).is_dir():
        return []
    try:
        names = store.list(f".{MANIFEST}")
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return [name.removesuffix(f".{MANIFEST}") for name in names if name.startswith("step-")]


def fetch_checkpoint(store: Store, name: str, folder: Path) -> str | None:
    """Downloads a checkpoint into the run's folder, where it appears whole or not at all.

    Args:
        store: of `checkpoint_store`.
        name: of `stored_checkpoints`.
        folder: of the run's checkpoints.

    Returns:
        Why it can never be used, or None when it lies there.

    Raises:
        UserError: when the store or this disk fails: that says nothing of the checkpoint.
    """
    partial = folder / f".tmp-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        described = store.read(stored_name(name, MANIFEST))
        for file, entry in json.loads(described)["files"].items():
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                return f"it would write outside its folder ({file})"
            with writing("a checkpoint", folder):
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
            size = store.size(stored_name(name, file))
            if size != entry["size"]:  # else reading it would wait for the bytes that it lacks
                return f"{file} has {size} bytes instead of {entry['size']}"
            if _fetch(store, stored_name(name, file), size, partial / file) != entry["sha256"]:
                return f"{file} has changed since it was written"
        with writing("a checkpoint", folder):
            (partial / MANIFEST).write_bytes(described)
            shutil.rmtree(folder / name, ignore_errors=True)
            partial.rename(folder / name)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return str(error)
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable manifest ({error})"
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return None


def _fetch(store: Store, name: str, size: int, path: Path) -> str:
    digest = hashlib.sha256()
    with writing("a checkpoint", path.parent), path.open("wb") as file:
        for start in range(0, size, _PIECE):
            piece = store.read_range(name, start, min(start + _PIECE, size))
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def stored_name(checkpoint: str, file: str) -> str:
    """Returns the name in a store of a checkpoint's file."""
    return f"{checkpoint}.{file.replace('/', _APART)}"
