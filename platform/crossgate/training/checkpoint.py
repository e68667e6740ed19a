"""Checkpoints that are whole or absent: written beside, described by a manifest, renamed.

A run directory's `checkpoints/step-00000120/` holds

- `state/rank-00000.safetensors`, ...: weights and optimiser, the pieces that a rank held, by parameter name;
- `random-00000.safetensors`, ...: random states of each rank;
- `weights.safetensors`: the whole task in fp32, in checkpoints that are the best so far;
- `manifest.json`: written last; size and SHA-256 of every other file, and where the run stood.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossgate._version import __version__
from crossgate.config import Recipe
from crossgate.errors import Unreachable, UserError, writing
from crossgate.recipe import as_of, differences, dump_recipe, load_recipe, recipe_digest
from crossgate.stream.storage import Store
from crossgate.training.durable import sync, write_atomically
from crossgate.training.engine import full_weights, set_loss_scale, user_settings
from crossgate.training.pieces import adam_steps, begin_moments, held_pieces, own_pieces, publish_values
from crossgate.training.randomness import begin_random_states, load_random_states, save_random_states
from crossgate.training.states import PieceReader, Unfit, write_pieces
from crossgate.training.upload import fetch_checkpoint, refuse_unwritable, stored_checkpoints
from crossgate.training.world import World

MANIFEST, WEIGHTS, STATE = "manifest.json", "weights.safetensors", "state"
FORMAT = 2
_NAMED = 6  # settings in one line


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    """Optimiser steps done."""
    ranks: int
    stage: int
    recipe: str
    """Digest of the settings that make the numbers."""
    stream: dict[str, Any]
    """State of the loader: which batch comes next."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last validation."""
    best_step: int = 0
    """Step of the best validation so far (0: none yet)."""
    best_value: float | None = None
    loss_scale: dict[str, float] = field(default_factory=dict)
    """Where the search for fp16's scale of losses stood."""
    classes: Sequence[str] = ()
    """Names of the heads' outputs, in order: the shards do not tell in which order their index numbers classes."""
    code: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative path -> size and sha256."""
    version: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.manifest.step


class Damaged(Exception):
    """A checkpoint that must not be used, and why."""


# ---- the run directory -----------------------------------------------------------------------------------------


def refuse_other_run(run_dir: Path, recipe: Recipe) -> None:
    """Checks that what a run directory holds, if anything, is this recipe's; a search may be given other settings.

    Raises:
        UserError: when it holds another kind of run, or one with other settings.
    """
    stored = run_dir / "recipe.yaml"
    if not stored.exists():
        return
    found = load_recipe(stored)
    grows = recipe.kind == found.kind == "search"
    if not grows and recipe_digest(found) != recipe_digest(recipe):
        raise _other_recipe(run_dir, recipe, differences(found, recipe))


def store_recipe(run_dir: Path, recipe: Recipe) -> None:
    """Writes the recipe into its run directory, whole or not at all.

    Raises:
        UserError: when it cannot be written.
    """
    with writing("the run's folder", run_dir):
        write_atomically(run_dir / "recipe.yaml", dump_recipe(recipe))


def claim_run_dir(run_dir: Path, recipe: Recipe, world: World) -> None:
    """Makes the run directory this recipe's, or refuses when it belongs to another one. Every rank calls it.

    The recipe is stored with a copy of the DeepSpeed JSON that it names: the original may be gone at the next start.

    Raises:
        UserError: when the directory holds a run with other settings, or for a DeepSpeed JSON that cannot be used.
    """
    if recipe.engine.deepspeed:
        user_settings(recipe.engine.deepspeed)  # complains before the directory is anybody's
    world.barrier()  # no rank looks while another still writes
    refuse_other_run(run_dir, recipe)
    world.barrier()
    if world.leads:
        with writing("the run's folder", run_dir):
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            for leftover in (run_dir / "checkpoints").glob(".*-step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            store_recipe(run_dir, _with_own_settings(recipe, run_dir))
    world.barrier()


def _with_own_settings(recipe: Recipe, run_dir: Path) -> Recipe:
    """Returns the recipe with the copy of its DeepSpeed JSON, if it names one, that it leaves in the run directory."""
    if not recipe.engine.deepspeed:
        return recipe
    copy = run_dir / "deepspeed.json"
    write_atomically(copy, Path(recipe.engine.deepspeed).read_text())
    engine = recipe.engine.model_copy(update={"deepspeed": str(copy)})
    return recipe.model_copy(update={"engine": engine})


def newest_whole(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest checkpoint whose every byte is as written, and why each newer one was passed over."""
    refused: list[str] = []
    for path in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        try:
            return verify(path), refused
        except Damaged as damage:
            refused.append(f"{path.name}: {damage}")
    return None, refused


def bring_newest(run_dir: Path, store: Store, newest: Checkpoint | None) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest whole checkpoint of run directory and store, and why newer ones there were passed over.

    Raises:
        UserError: when the store cannot be read and the run directory has none either: starting anew is no answer;
            when it fails while a newer one comes from it; or when it can be read and takes no file.
    """
    refused: list[str] = []
    try:
        names = stored_checkpoints(store)
    except UserError as error:
        if newest is None:
            raise
        return newest, [f"of {store.url}: {error}"]
    refuse_unwritable(store)
    for name in reversed(names):
        if newest is not None and name <= newest.path.name:
            break
        reason = fetch_checkpoint(store, name, run_dir / "checkpoints")
        if reason is None:
            try:
                return verify(run_dir / "checkpoints" / name), refused
            except Damaged as damage:
                reason = str(damage)
        refused.append(f"{name} of {store.url}: {reason}")
    return newest, refused


def refuse_all_damaged(run_dir: Path, store: Store | None, refused: list[str]) -> None:
    """Refuses a start that would begin at step 0, and write over what is left of a run, since all of it is damaged.

    Args:
        refused: of `newest_whole` and `bring_newest`, which found none that is whole.

    Raises:
        UserError: when there are checkpoints; none at all is a run's beginning.
    """
    if not refused:
        return
    beside = f" and {store.url}" if store else ""
    raise UserError(
        f"no checkpoint of this run is whole, of {len(refused)} (the newest: {refused[0]})",
        where=run_dir / "checkpoints",
        cure=f"move this folder{beside} aside to start anew, or set another run.name",
    )


def bring(run_dir: Path, store: Store, step: int) -> str | None:
    """Downloads the checkpoint of a step and puts it in the place of what the run directory has of it.

    Returns:
        Why that can never be, or None when it lies there whole.

    Raises:
        Unreachable: when the store does not answer now.
        UserError: when this disk takes no more.
    """
    path = checkpoint_path(run_dir, step)
    try:
        if path.name not in stored_checkpoints(store):
            return f"{store.url} has no other"
    except Unreachable:
        raise
    except UserError as error:
        return str(error)
    return fetch_checkpoint(store, path.name, path.parent)


def verify(path: Path) -> Checkpoint:
    """Returns the checkpoint after comparing every file with the manifest.

    Raises:
        Damaged: naming the first file that differs.
        UserError: for one in another format, which is not damaged and must not be passed over.
    """
    try:
        described = json.loads((path / MANIFEST).read_text())
        version = described.get("version", FORMAT)
        if isinstance(version, int) and version != FORMAT:
            raise _other_version(path, f"it has format {version}, not {FORMAT}")
        manifest = Manifest(**described)
    except FileNotFoundError:
        raise Damaged("no manifest, so it was never finished" if path.is_dir() else "it is not there") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"unreadable manifest ({error})") from None
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if file.stat().st_size != expected["size"]:
            raise Damaged(f"{name} has {file.stat().st_size} bytes instead of {expected['size']}")
        if _sha256(file) != expected["sha256"]:
            raise Damaged(f"{name} has changed since it was written")
    return Checkpoint(path, manifest)


def damage_of(run_dir: Path, step: int) -> str | None:
    """Returns what is wrong with the checkpoint of a step, or None when it is whole."""
    try:
        verify(checkpoint_path(run_dir, step))
    except Damaged as damage:
        return str(damage)
    return None


def has_weights(run_dir: Path, step: int) -> bool:
    """Whether the checkpoint of a step holds the whole task."""
    return (checkpoint_path(run_dir, step) / WEIGHTS).exists()


def load_weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Returns the whole task's fp32 state at a step that was the best so far or the last.

    Raises:
        UserError: when it is not there.
    """
    path = checkpoint_path(run_dir, step) / WEIGHTS
    if not path.exists():
        raise UserError("the best weights are gone", where=path, cure="delete the run's folder and start anew")
    return load_file(path)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


# ---- save and restore ------------------------------------------------------------------------------------------


def save_checkpoint(engine: Any, run_dir: Path, manifest: Manifest, world: World, *, weights: bool) -> Path:
    """Writes a checkpoint; it is visible under its name only when whole. Every rank calls it.

    Args:
        manifest: everything but `files`, `classes` and `code`, which are filled in here.
        weights: also write the whole fp32 task, for the model that evaluation and release read.

    Raises:
        UserError: for a disk that is full; earlier checkpoints stay as they are.
    """
    final = checkpoint_path(run_dir, manifest.step)
    partial = final.with_name(f".tmp-{final.name}")
    if world.leads:
        shutil.rmtree(partial, ignore_errors=True)
        with writing("a checkpoint", partial):
            (partial / STATE).mkdir(parents=True)
    world.barrier()
    with writing("a checkpoint", partial):
        mine = [partial / STATE / f"rank-{world.rank:05d}.safetensors", _random(partial, world)]
        write_pieces(mine[0], own_pieces(engine, world), adam_steps(engine))
        save_random_states(mine[1])
        if weights:
            state = full_weights(engine, world)
            if world.leads:
                mine.append(partial / WEIGHTS)
                save_file(state, mine[-1])
        for path in mine:
            sync(path)
    world.barrier()
    files = _digests(partial, world)
    if world.leads:
        classes = _classes(engine)
        described = asdict(manifest) | {"files": files, "classes": classes, "code": _code_version()}
        with writing("a checkpoint", partial):
            write_atomically(partial / MANIFEST, json.dumps(described, indent=1))
            sync(partial / STATE)
            sync(partial)
            _replace_folder(partial, final)
            sync(final.parent)
    world.barrier()
    return final


def restore(engine: Any, checkpoint: Checkpoint, recipe: Recipe, world: World) -> None:
    """Puts weights, optimiser and random states back as they were, whatever ranks and ZeRO stage saved them.

    A rank that the checkpoint has no random states of begins new ones.

    Args:
        recipe: of the whole run.

    Raises:
        UserError: when the checkpoint was made by another recipe, for other classes, or by a version with another model
            or format.
    """
    manifest = checkpoint.manifest
    if manifest.recipe != recipe_digest(as_of(recipe, manifest.step)):
        raise _other_recipe(checkpoint.path.parents[1], recipe)
    _refuse_other_classes(checkpoint, _classes(engine), recipe)
    try:
        with PieceReader(checkpoint.path / STATE) as saved:
            saved.check_names(set(engine.module.task.state_dict(keep_vars=True)))
            begin_moments(engine, saved.steps)
            for piece in held_pieces(engine, world):
                saved.fill(piece)
    except Unfit as error:
        raise _other_version(checkpoint.path, f"its weights are not this model's: {error}") from None
    publish_values(engine)
    set_loss_scale(engine, manifest.loss_scale)
    states = _random(checkpoint.path, world)
    if states.exists():
        load_random_states(states)
    else:
        begin_random_states(recipe.run.seed, world.rank, manifest.step)


def roll_back(engine: Any, checkpoint: Checkpoint, world: World) -> None:
    """Puts weights and optimiser back, and nothing else: counters, random states and the stream stay where they are."""
    with PieceReader(checkpoint.path / STATE) as saved:
        begin_moments(engine, saved.steps)
        for piece in held_pieces(engine, world):
            if piece.trains:
                saved.fill(piece)
    publish_values(engine)


def prune(run_dir: Path, keep: int, saved_step: int, best_step: int, busy: str = "") -> set[str]:
    """Deletes all but the `keep` newest checkpoints, the best one and the one named, and returns which shall stay.

    Whatever is newer than the step just saved was damaged when the run resumed: it goes, and counts for nothing.
    """
    paths = sorted((run_dir / "checkpoints").glob("step-*"))
    whole = [path for path in paths if path.name <= checkpoint_path(run_dir, saved_step).name]
    kept = {path.name for path in whole[-keep:]} | {checkpoint_path(run_dir, best_step).name}
    for path in paths:
        if path.name not in kept | {busy}:
            shutil.rmtree(path, ignore_errors=True)
    return kept


# ---- parts -----------------------------------------------------------------------------------------------------


def _classes(engine: Any) -> list[str]:
    """Returns the classes that the task's heads tell apart; none for a task without labels."""
    return list(getattr(engine.module.task, "classes", ()))


def _refuse_other_classes(checkpoint: Checkpoint, classes: Sequence[str], recipe: Recipe) -> None:
    saved = checkpoint.manifest.classes  # empty in checkpoints of versions that did not note them
    if not saved or list(saved) == list(classes):
        return
    place, (was, now) = next(
        (place, pair) for place, pair in enumerate(zip_longest(saved, classes, fillvalue="")) if pair[0] != pair[1]
    )
    raise UserError(
        f"class {place} of the checkpoint {checkpoint.path} is {was!r}, of the index {now!r}",
        where=recipe.data.index,
        expected="the classes that the run began with, in their order",
        cure="pack again with their --classes, or set another run.name",
    )


def _random(folder: Path, world: World) -> Path:
    return folder / f"random-{world.rank:05d}.safetensors"


def _digests(folder: Path, world: World) -> dict[str, dict[str, Any]]:
    """Returns size and digest of every file, the hashing shared out over the ranks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    mine = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in files[world.rank :: world.ranks]
    }
    return {name: entry for part in world.gather(mine) for name, entry in part.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_folder(partial: Path, final: Path) -> None:
    """Renames into place; a damaged folder of that name, passed over at resume, makes way."""
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(final)


def _code_version() -> dict[str, str]:
    import deepspeed

    return {"crossgate": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _other_recipe(run_dir: Path, recipe: Recipe, named: Sequence[str] = ()) -> UserError:
    beyond = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    which = f": {', '.join(named[:_NAMED])}{beyond}" if named else ""
    return UserError(
        f"run '{recipe.run.name}' was made with other settings{which}",
        where=run_dir,
        expected="the recipe stored there (recipe.yaml)",
        cure="set another run.name, or delete the folder to start anew",
    )


def _other_version(path: Path, reason: str) -> UserError:
    return UserError(
        reason,
        where=path,
        expected="a checkpoint that this version of crossgate and timm wrote",
        cure="go on with the version that wrote it, or start anew under another run.name",
    )
