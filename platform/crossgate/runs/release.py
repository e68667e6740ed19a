"""Releases a run's model with the settings that the run was made with."""

from __future__ import annotations

from pathlib import Path

from crossgate.errors import UserError
from crossgate.recipe import load_recipe
from crossgate.registry.release import ReleasedModel, release


def release_run(run: Path, *, name: str = "", alias: str = "", tracking_uri: str = "") -> ReleasedModel:
    """Registers the model of a finished fine-tuning run.

    Args:
        run: its directory.
        name, alias: over the recipe's `release` section.
        tracking_uri: over the recipe's `tracking.uri`.

    Raises:
        UserError: as `registry.release.release`.
    """
    stored = run / "recipe.yaml"
    if not stored.exists():
        raise UserError("not a run directory", where=run, expected="a folder with recipe.yaml, such as runs/NAME")
    recipe = load_recipe(stored)
    given = {key: value for key, value in {"name": name, "alias": alias}.items() if value}
    tracking = recipe.tracking.model_copy(update={"uri": tracking_uri} if tracking_uri else {})
    return release(run, recipe.release.model_copy(update=given), tracking)
