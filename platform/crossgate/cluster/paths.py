"""Paths of a recipe that mean the same in every process, wherever Ray starts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossgate import environment
from crossgate.config import Choice, Range, Recipe
from crossgate.errors import UserError

_SQLITE = "sqlite:///"
_READ = ("data.index", "release.index", "finetune.init", "evaluation.model", "engine.deepspeed")
_MIXED = "data.mix.index"
_WRITTEN = ("finetune.features",)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Returns the recipe with its local paths made absolute; addresses with a scheme stay as they are.

    Relative paths start at the working folder. A job of `ray job submit` runs in a copy of the submitter's folder
    that is thrown away, so what it writes goes below ``CROSSGATE_HOME`` (default: ``~/crossgate``), and what it reads
    is looked for there too when the copy does not have it. Paths that a search sets for its trials are meant as well.

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
    fixed.tracking.uri = tracking_address(recipe.tracking.uri)
    for key in (*_READ, *_WRITTEN):
        name, option = key.split(".")
        section = getattr(fixed, name)
        setattr(section, option, _of_key(key, getattr(section, option)))
    for corpus in fixed.data.mix:
        corpus.index = read(corpus.index)
    fixed.search.explore = _of_key("", fixed.search.explore)
    fixed.search.space = {key: _dimension(key, one) for key, one in fixed.search.space.items()}
    return fixed


def _of_key(key: str, value: Any) -> Any:
    """Returns a key's value with the paths in it made absolute; a list is one of values, or of tables (`data.mix`)."""
    if isinstance(value, Mapping):
        return {name: _of_key(f"{key}.{name}".lstrip("."), one) for name, one in value.items()}
    if isinstance(value, list):
        return [_of_key(key, one) for one in value]
    if not isinstance(value, str):
        return value
    return read(value) if key in _READ or key == _MIXED else written(value) if key in _WRITTEN else value


def _dimension(key: str, dimension: list | Choice | Range) -> list | Choice | Range:
    if isinstance(dimension, list):
        return _of_key(key, dimension)
    changed: dict[str, Any] = {"when": _of_key("", dimension.when)}
    if isinstance(dimension, Choice):
        changed["values"] = _of_key(key, dimension.values)
    return dimension.model_copy(update=changed)


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
