"""What checkpoints a recipe's run has, in its folder and in the store, and which of them are whole."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.evaluation.tables import Table
from crossgate.runs.context import run_directory
from crossgate.stream.storage import FileDetails, Store
from crossgate.training.checkpoint import Damaged, verify
from crossgate.training.progress import duration
from crossgate.training.upload import MANIFEST, checkpoint_store, stored_name

WHOLE, SIZED = "whole", "whole by its files' lengths"
_MIB = 1 << 20


@dataclass(frozen=True)
class Found:
    """One checkpoint."""

    where: str
    name: str
    size: int
    age_s: float
    """Since it was finished; NaN where nobody knows."""
    damage: str
    """Why it cannot be used; empty for one that can."""

    @property
    def row(self) -> list[str]:
        """For the table."""
        state = f"damaged: {self.damage}" if self.damage else WHOLE if self.where == "folder" else SIZED
        step = self.name.removeprefix("step-").lstrip("0") or "0"
        return [self.where, step, f"{self.size / _MIB:.1f} MiB", duration(self.age_s), state]


def find_checkpoints(recipe: Recipe) -> list[Found]:
    """Returns the checkpoints of the run, oldest first, those of the folder before those of the store.

    Those of the folder are read whole and compared with their manifest. Of those in the store the lengths are compared:
    their content is when one is fetched.

    Raises:
        UserError: for a store that cannot be read, or a checkpoint of another format.
    """
    found = [_local(path) for path in sorted((run_directory(recipe) / "checkpoints").glob("step-*"))]
    store = checkpoint_store(recipe.training.checkpoint_url, recipe.run.name)
    return found + (_stored(store) if store else [])


def table(found: list[Found]) -> str:
    """Returns them for people."""
    return Table(["where", "step", "size", "age", "state"], [one.row for one in found]).text()


def _local(path: Path) -> Found:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    manifest, damage = path / MANIFEST, ""
    age = time.time() - manifest.stat().st_mtime if manifest.exists() else math.nan
    try:
        verify(path)
    except Damaged as reason:
        damage = str(reason)
    return Found("folder", path.name, size, age, damage)


def _stored(store: Store) -> list[Found]:
    try:
        files = store.details()
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # a folder that no checkpoint has reached yet
            return []
        raise
    names = sorted({name.partition(".")[0] for name in files if name.startswith("step-")})
    return [_stored_one(store, name, files) for name in names]


def _stored_one(store: Store, name: str, files: dict[str, FileDetails]) -> Found:
    size = sum(about.size for file, about in files.items() if file.startswith(f"{name}."))
    last = stored_name(name, MANIFEST)
    age = time.time() - files[last].modified if last in files else math.nan
    return Found("store", name, size, age, _damage(store, name, files))


def _damage(store: Store, name: str, files: dict[str, FileDetails]) -> str:
    if stored_name(name, MANIFEST) not in files:
        return "no manifest, so it is on its way there or was cut off"
    try:
        expected = {file: int(entry["size"]) for file, entry in _manifest(store, name)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable manifest ({error})"
    for file, size in expected.items():
        about = files.get(stored_name(name, file))
        if about is None:
            return f"{file} is missing"
        if about.size != size:
            return f"{file} has {about.size} bytes instead of {size}"
    return ""


def _manifest(store: Store, name: str) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(store.read(stored_name(name, MANIFEST)))
