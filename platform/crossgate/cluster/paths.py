"""Paths of a recipe that mean the same in every process, wherever Ray starts it."""

from __future__ import annotations

from pathlib import Path

from crossgate import environment
from crossgate.config import Recipe


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Returns the recipe with its local paths made absolute; addresses with a scheme stay as they are.

    Relative paths start at the working folder. A job of `ray job submit` runs in a copy of the submitter's folder
    that is thrown away, so what it writes goes below ``CROSSGATE_HOME`` (default: ``~/crossgate``), and what it reads
    is looked for there too when the copy does not have it.
    """
    fixed = recipe.model_copy(deep=True)
    base = environment.home() or (Path.home() / "crossgate" if environment.in_ray_job() else Path.cwd())
    fixed.run.output = _absolute(recipe.run.output, base)
    for section, key in ((fixed.data, "index"), (fixed.finetune, "init"), (fixed.engine, "deepspeed")):
        here = Path.cwd() / getattr(section, key)
        setattr(section, key, _absolute(getattr(section, key), Path.cwd() if here.exists() else base))
    return fixed


def _absolute(path: str, base: Path) -> str:
    if not path or "://" in path:
        return path
    return str((base / path).absolute())
