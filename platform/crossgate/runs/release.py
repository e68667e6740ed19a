"""Releases a run's model with the settings that the run was made with.

What reads models is imported once the run has been found: a misspelt path is said at once, not after their import.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.recipe import load_recipe

if TYPE_CHECKING:
    from crossgate.registry.aliases import Decision
    from crossgate.registry.release import ReleasedModel


def release_run(
    run: Path,
    *,
    name: str = "",
    alias: str = "",
    tracking_uri: str = "",
    settings: tuple[str, ...] = (),
    new_evaluation_set: bool = False,
) -> ReleasedModel:
    """Registers the model of a finished fine-tuning run; where its name has a champion, the gate decides.

    Args:
        run: its directory.
        name, alias: over the recipe's `release` section.
        tracking_uri: over the recipe's `tracking.uri`.
        settings: ``release.KEY=VALUE`` over the recipe's.
        new_evaluation_set: judge on this run's evaluation set from now on, though the name is pinned to another.

    Raises:
        UserError: as `registry.release.release`.
    """
    recipe = _recipe(run, name, alias, tracking_uri, settings)
    from crossgate.registry.release import release
    from crossgate.runs.promotion import frozen_set

    frozen = cache(partial(frozen_set, recipe))
    return release(run, recipe.release, recipe.tracking, partial(_judged, recipe, run), frozen, new_evaluation_set)


def decide_on_run(
    run: Path,
    *,
    name: str = "",
    alias: str = "",
    tracking_uri: str = "",
    settings: tuple[str, ...] = (),
    new_evaluation_set: bool = False,
) -> Decision:
    """Returns what `release_run` would decide; registers nothing.

    Raises:
        UserError: as `release_run`.
    """
    recipe = _recipe(run, name, alias, tracking_uri, settings)
    from crossgate.registry.release import decide
    from crossgate.runs.promotion import frozen_set

    frozen = cache(partial(frozen_set, recipe))
    return decide(run, recipe.release, recipe.tracking, partial(_judged, recipe, run), frozen, new_evaluation_set)


def _judged(recipe: Recipe, run: Path, champion: Path | None) -> Decision:
    """Asks the gate.

    Raises:
        UserError: as `runs.promotion.judge`, and where the two cannot be compared clip by clip, such as for one that
            only the champion could not decode.
    """
    from crossgate.runs.promotion import judge

    try:
        return judge(recipe, run, champion)
    except ValueError as error:
        index = recipe.release.index or recipe.data.index
        raise UserError(
            f"the gate cannot compare the run with the champion on this set ({error})",
            where=index,
            cure=f"see `crossgate check {index}`: pack its broken clips again, or name another set in release.index",
        ) from error


def _recipe(run: Path, name: str, alias: str, tracking_uri: str, settings: tuple[str, ...]) -> Recipe:
    stored = run / "recipe.yaml"
    if not stored.exists():
        raise UserError("not a run directory", where=run, expected="a folder with recipe.yaml, such as runs/NAME")
    for one in settings:
        if not one.startswith("release."):
            raise UserError("not a setting of a release", where=one, expected="release.KEY=VALUE")
    recipe = load_recipe(stored, settings)
    given = {key: value for key, value in {"name": name, "alias": alias}.items() if value}
    tracking = recipe.tracking.model_copy(update={"uri": tracking_uri} if tracking_uri else {})
    return recipe.model_copy(
        update={"release": recipe.release.model_copy(update=given), "tracking": tracking}, deep=True
    )
