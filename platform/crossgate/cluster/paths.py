"""Paths of a recipe that mean the same in every process, wherever Ray starts it."""

from __future__ import annotations

from pathlib import Path

from crossgate import environment
from crossgate.config import Recipe
from crossgate.errors import UserError

_SQLITE = "sqlite:///"


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Returns the recipe with its local paths made absolute; addresses with a scheme stay as they are.

    Relative paths start at the working folder. A job of `ray job submit` runs in a copy of the submitter's folder
    that is thrown away, so what it writes goes below ``CROSSGATE_HOME`` (default: ``~/crossgate``), and what it reads
    is looked for there too when the copy does not have it.

    Raises:
        UserError: for runs on object storage.
    """
    if "://" in recipe.run.output:
        raise UserError(
            f"runs cannot be kept at '{recipe.run.output}'",
            where="run.output",
            expected="a folder, on a file system that all ranks share",
        )
    fixed = recipe.model_copy(deep=True)
    fixed.run.output = written(recipe.run.output)
    fixed.finetune.features = written(recipe.finetune.features)
    fixed.tracking.uri = tracking_address(recipe.tracking.uri)
    for section, key in (
        (fixed.data, "index"),
        *((corpus, "index") for corpus in fixed.data.mix),
        (fixed.release, "index"),
        (fixed.finetune, "init"),
        (fixed.evaluation, "model"),
        (fixed.engine, "deepspeed"),
    ):
        setattr(section, key, read(getattr(section, key)))
    return fixed


def tracking_address(given: str) -> str:
    """Returns the tracking server that is given, else the environment's; empty where nobody names one."""
    address = given or environment.tracking_uri() or ""  # workers lack this variable
    if not address.startswith(_SQLITE):
        return address
    return _SQLITE + _absolute(address.removeprefix(_SQLITE), _base())


def written(path: str) -> str:
    """Returns the absolute path of what is written; an address with a scheme stays as it is."""
    return _absolute(path, _base())


def read(path: str) -> str:
    """Returns the absolute path of what is read, here if it exists here."""
    return _absolute(path, Path.cwd() if (Path.cwd() / path).exists() else _base())


def _base() -> Path:
    return environment.home() or (Path.home() / "crossgate" if environment.in_ray_job() else Path.cwd())


def _absolute(path: str, base: Path) -> str:
    if not path or "://" in path:
        return path
    return str((base / path).absolute())
