"""Reads a recipe (YAML and dotted overrides) into the typed tree of `config`, with errors that name the key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from crossgate.config import Recipe
from crossgate.errors import UserError, nearest

# What may differ between two starts of the same run without changing its numbers.
_OPERATIONAL = ("run", "cluster", "tracking", "release")
_OPERATIONAL_KEYS = {
    "data": ("loader_workers", "prefetch", "index"),
    "training": ("log_every", "save_every", "keep"),
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Returns the recipe of a YAML file with ``section.key=value`` overrides applied.

    Raises:
        UserError: for a missing or malformed file, an unknown key or an ill-typed value, naming the nearest key.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError("no such recipe", where=path, cure="see jobs/recipes for examples") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"not readable as YAML ({error})", where=path) from None
    if not isinstance(tree, dict):
        raise UserError("not a recipe", where=path, expected="a YAML mapping that begins with `kind:`")
    for override in overrides:
        _override(tree, override)
    recipe = parse_recipe(tree, where=str(path))
    if not recipe.run.name:
        recipe.run.name = f"{recipe.kind}-{path.stem}-{recipe_digest(recipe)[:8]}"
    return recipe


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Returns the validated recipe of a plain tree.

    Raises:
        UserError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, where) from None


def with_overrides(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """Returns a copy of the recipe with dotted keys replaced, validated anew."""
    tree = recipe.model_dump(mode="json")
    for key, value in overrides.items():
        _set(tree, key, value)
    return parse_recipe(tree, where="override")


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat_recipe(recipe: Recipe) -> dict[str, str]:
    """Returns dotted key -> value as text, for MLflow parameters."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = str(value)

    walk("", recipe.model_dump(mode="json"))
    return flat


def recipe_digest(recipe: Recipe) -> str:
    """Returns the SHA-256 of all settings that change a run's numbers; names, places and workers do not."""
    tree = recipe.model_dump(mode="json", exclude=set(_OPERATIONAL))
    for section, keys in _OPERATIONAL_KEYS.items():
        for key in keys:
            tree[section].pop(key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise UserError("not an override", where=override, expected="section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    _set(tree, key.strip(), value)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"'{section}' holds a value, not a section", where=key)
    tree[last] = value


def _explained(error: ValidationError, where: str) -> UserError:
    """Turns pydantic's first complaint into one line that names file, key, expectation and nearest key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(
            f"unknown key '{key}'", where=where, cure=nearest(str(first["loc"][-1]), _siblings(first["loc"]))
        )
    if first["type"] == "missing":
        return UserError(f"key '{key}' is missing", where=where, cure="add it to the recipe")
    message = str(first["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(first.get("input"), dict) else f", found {first.get('input')!r}"
    return UserError(f"key '{key}': {message}{found}" if key else message, where=where, cure="run `crossgate explain`")


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """Returns the valid keys beside the one at the location."""
    node: Any = Recipe
    for part in location[:-1]:
        annotation = node.model_fields[part].annotation if part in getattr(node, "model_fields", {}) else None
        if annotation is None:
            break
        node = annotation
        if not (isinstance(node, type) and issubclass(node, BaseModel)):
            inner = [a for a in getattr(node, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
            if not inner:
                return []
            return list(inner[0].model_fields)
    return list(node.model_fields)
