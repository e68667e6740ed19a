"""Reads a recipe (YAML and dotted overrides) into the typed tree of `config`, with errors that name the key."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import BaseModel, ValidationError

from crossgate.config import Recipe
from crossgate.config.base import CredentialsError
from crossgate.errors import UserError, nearest
from crossgate.yaml_file import StrictLoader, read_yaml

# What may differ between two starts of the same run without changing its numbers.
_OPERATIONAL = ("run", "cluster", "tracking", "release")
_OPERATIONAL_KEYS = {
    "data": ("loader_workers", "prefetch", "index", "cache"),
    "engine": ("zero_stage", "offload", "activation_checkpointing", "compile"),
    # What is done about a loss that is not finite: nothing until there is one, and then a run must be able to go on.
    "training": (
        "log_every",
        "save_every",
        "save_minutes",
        "keep",
        "checkpoint_url",
        "nonfinite_skips",
        "nonfinite_rollbacks",
        "watchdog_s",
        "profile",
        "trace",
    ),
}
# Files and folders, which count by what they are and not by where.
_PLACES = {
    "places.deepspeed": "engine.deepspeed",
    "places.init": "finetune.init",
    "places.features": "finetune.features",
    "places.model": "evaluation.model",
}
# Kinds whose results are all of their index: under another one they are another run. Training resumes over a copy of
# its shards elsewhere, and its loader compares the index's own digest.
_NAMED_BY_INDEX = ("evaluate", "search", "study")
# Files that travel with a Ray job lie below this folder, in one named by the package's hash.
_TRAVELLED = "working_dir_files"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
HIDDEN = "***"
"""What stands in stored files and messages for a user name and password."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Returns the recipe of a YAML file with ``section.key=value`` overrides applied.

    Raises:
        UserError: for a missing or malformed file, a key that is unknown (with the nearest) or there twice, or an
            ill-typed value.
    """
    path = Path(path)
    tree = read_yaml(path, "recipe", "a YAML mapping that begins with `kind:`", "see jobs/recipes for examples")
    overrides = list(overrides)
    for override in overrides:
        _override(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise explained(error, _origin(error, path, overrides)) from None
    stretches(recipe)
    if not recipe.run.name:
        recipe.run.name = f"{recipe.kind}-{re.sub(_NOT_IN_NAMES, '-', path.stem)}-{_name_digest(recipe)[:8]}"
    return recipe


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Returns the validated recipe of a plain tree.

    Raises:
        UserError: as `load_recipe`.
    """
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise explained(error, where) from None
    stretches(recipe)
    return recipe


def with_overrides(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """Returns a copy of the recipe with dotted keys replaced, validated anew."""
    tree = recipe.model_dump(mode="json")
    for key, value in overrides.items():
        _set(tree, key, value)
    return parse_recipe(tree, where="override")


@dataclass(frozen=True)
class Stretch:
    """A part of a training in which no setting changes."""

    settings: Recipe
    """The recipe with the settings in force."""
    whole: Recipe
    """The recipe of the whole run, which folder and checkpoints belong to."""
    until: int = 0
    """Step at which it ends (0: the run's last)."""


def stretches(recipe: Recipe, until: int = 0) -> list[Stretch]:
    """Returns the parts of a training, one after the other: one, where the recipe has no schedule.

    Args:
        recipe: of the whole run.
        until: step at which the last one pauses (0: none, it goes to the run's end).

    Raises:
        UserError: for a schedule with a value that its key cannot have.
    """
    changes = [change for change in recipe.training.schedule if not until or change.after < until]
    if not changes:
        return [Stretch(recipe, recipe, until)]
    found, tree = [], recipe.model_dump(mode="json")
    _set(tree, "training.schedule", [])
    settings = parse_recipe(tree)
    for change in changes:
        found.append(Stretch(settings, recipe, change.after))
        for key, value in change.settings.items():
            _set(tree, key, value)
        settings = parse_recipe(tree, where=f"training.schedule, after step {change.after}")
    return [*found, Stretch(settings, recipe, until)]


def as_of(recipe: Recipe, step: int) -> Recipe:
    """Returns the recipe as far as it matters up to a step: without the changes of its schedule after it."""
    changes = tuple(change for change in recipe.training.schedule if change.after < step)
    if changes == recipe.training.schedule:
        return recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"schedule": changes})})


def micro_batch(recipe: Recipe, ranks: int, where: str = "data.global_batch") -> int:
    """Returns the clips of a micro-batch on each of so many ranks.

    Args:
        where: what set the number of ranks or clips, for people.

    Raises:
        UserError: when the ranks cannot share the global batch evenly.
    """
    try:
        return recipe.micro_batch(ranks)
    except ValueError as error:
        raise UserError(str(error), where=where) from None


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML, for people and files: without the tracking server's password."""
    return yaml.safe_dump(_shown(recipe), sort_keys=False, allow_unicode=True)


def flat_recipe(recipe: Recipe) -> dict[str, str]:
    """Returns dotted key -> value as text, for MLflow parameters; redacted as `dump_recipe`."""
    return {key: str(value) for key, value in _flat(_shown(recipe)).items() if value != {}}


def recipe_digest(recipe: Recipe) -> str:
    """Returns the SHA-256 of all settings that change a run's numbers; names, places and workers do not.

    Only what differs from the defaults counts, so that a version with a new setting still finds earlier runs.
    A DeepSpeed JSON counts by its content. A model to start from counts by its path, without the folder that a Ray job
    unpacks what travels with it into: that has another name each time.
    """
    return _sha256(json.dumps(_that_counts(recipe), sort_keys=True).encode())


def differences(before: Recipe, now: Recipe) -> list[str]:
    """Returns what makes the digests of two recipes differ: ``key was 1, is 2``, by key."""
    old, new = (_flat(_that_counts(recipe)) for recipe in (before, now))
    shown_old, shown_new = (_flat(recipe.model_dump(mode="json")) for recipe in (before, now))
    found = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        key = _PLACES.get(name, name)
        was, now_is = (json.dumps(shown.get(key), ensure_ascii=False) for shown in (shown_old, shown_new))
        found.append(f"{key} has other content" if was == now_is else f"{key} was {was}, is {now_is}")
    return found


def _that_counts(recipe: Recipe) -> dict[str, Any]:
    """Returns the tree of all settings that make the numbers."""
    tree = recipe.model_dump(mode="json", exclude=set(_OPERATIONAL), exclude_defaults=True)
    for section, keys in _OPERATIONAL_KEYS.items():
        for key in keys:
            tree.get(section, {}).pop(key, None)
    for corpus in tree.get("data", {}).get("mix", ()):
        corpus.pop("index")
    tree["places"] = {
        "deepspeed": _content(recipe.engine.deepspeed),
        "init": _without_package(recipe.finetune.init),
        "features": bool(recipe.finetune.features),
        "model": _without_package(recipe.evaluation.model),
    }
    for place in _PLACES.values():
        section, _, key = place.partition(".")
        tree.get(section, {}).pop(key, None)
    return {name: section for name, section in tree.items() if section != {}}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> value; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def redacted(uri: str) -> str:
    """Returns the URI without user name and password."""
    parts = urlsplit(uri)
    query = re.sub(r"((?:^|&)(?:user|password)=)[^&]*", rf"\1{HIDDEN}", parts.query)
    host = parts.netloc.rpartition("@")[2]
    if query == parts.query and host == parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=f"{HIDDEN}@{host}" if host != parts.netloc else host, query=query))


def _shown(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    tree["tracking"]["uri"] = redacted(recipe.tracking.uri)
    return tree


def _name_digest(recipe: Recipe) -> str:
    digest = recipe_digest(recipe)
    if recipe.kind not in _NAMED_BY_INDEX:
        return digest
    return _sha256(" ".join([digest, recipe.data.index, *(corpus.index for corpus in recipe.data.mix)]).encode())


def _content(path: str) -> str:
    """Returns the digest of a file; its path where it cannot be read, which the run itself will complain about."""
    try:
        return _sha256(Path(path).read_bytes()) if path else ""
    except OSError:
        return path


def _without_package(path: str) -> str:
    parts = Path(path).parts
    return str(Path(*parts[parts.index(_TRAVELLED) + 2 :])) if _TRAVELLED in parts else path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _origin(error: ValidationError, path: Path, overrides: Iterable[str]) -> str:
    """Returns where the complaint's key was set: the override that did, else the file."""
    found = [str(part) for part in error.errors()[0]["loc"]]
    for override in overrides:
        given = override.partition("=")[0].strip().split(".")
        shared = min(len(given), len(found))
        if shared and given[:shared] == found[:shared]:
            return f"command line, {'.'.join(given) if _secret(error) else override}"
    return str(path)


def _override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise UserError("not an override", where=override, expected="section.key=value")
    try:
        value = yaml.load(text, StrictLoader)
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


def explained(error: ValidationError, where: str, cure: str = "run `crossgate explain`") -> UserError:
    """Turns pydantic's first complaint into one line that names file, key, expectation and nearest key.

    Args:
        error: the complaint.
        where: the recipe, or the command whose settings they are.
        cure: for a value that will not do.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(
            f"unknown key '{key}'", where=where, cure=nearest(str(first["loc"][-1]), _siblings(first["loc"]))
        )
    if first["type"] == "missing":
        return UserError(f"key '{key}' is missing", where=where, cure="add it to the recipe")
    message = str(first["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(first.get("input"), dict) or _secret(error) else f", found {first.get('input')!r}"
    named = not key or where.partition(", ")[2].partition("=")[0].strip() == key  # an override that set just it
    return UserError(message + found if named else f"key '{key}': {message}{found}", where=where, cure=cure)


def _secret(error: ValidationError) -> bool:
    """Says whether what was found must not be repeated."""
    return isinstance(error.errors()[0].get("ctx", {}).get("error"), CredentialsError)


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
