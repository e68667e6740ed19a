"""What every kind of run opens first and closes last: world, run directory, index, tracker."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.errors import UserError, nearest, writing
from crossgate.evaluation import Evaluation, positive_class, style, training_section, write_report, write_results
from crossgate.recipe import dump_recipe, micro_batch
from crossgate.runs.ownership import nothing_left_of_a_refusal, only_start
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader
from crossgate.tracking import Tracker, open_tracker
from crossgate.tracking.provenance import code_version
from crossgate.training.checkpoint import refuse_other_run
from crossgate.training.metrics import read_metrics
from crossgate.training.world import World, current_world

Part = Literal["train", "val", "test"]
log = logging.getLogger("crossgate.runs")
PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass
class RunContext:
    """The open resources of a run. Rank 0 alone writes what a run writes once."""

    recipe: Recipe
    world: World
    directory: Path
    index: Index
    tracker: Tracker
    bad_clips: dict[Part, int] = field(default_factory=dict)
    """Part of the data -> clips that could not be decoded when it was last predicted (rank 0 only)."""
    kept: dict[Part, ClipBatch] = field(default_factory=dict)
    """Part of the data -> all its clips as features of the frozen encoders, where the run trains on those."""

    def splits(self, part: Part) -> tuple[str, ...]:
        """Returns the splits of a part of the data; none where the recipe has none."""
        return getattr(self.recipe.data, part)

    def training_loader(self) -> ClipLoader:
        """Returns this rank's share of the training splits, one micro-batch at a time."""
        recipe, world = self.recipe, self.world
        return ClipLoader(
            self.index,
            recipe.data.train,
            recipe.data,
            seed=recipe.run.seed,
            rank=world.rank,
            ranks=world.ranks,
            micro_batch=micro_batch(recipe, world.ranks),
        )

    def provenance(self) -> dict[str, object]:
        """Returns what the results came from."""
        return {
            "run": self.directory.name,
            "mlflow_run": self.tracker.run_id or "not tracked",
            "index": self.recipe.data.index,
            "index_digest": self.index.digest,
            "seed": self.recipe.run.seed,
            "ranks": self.world.ranks,
            **code_version(),
        }

    def publish(self, done: Evaluation, title: str, step: int) -> None:
        """Writes figures, results.json and report.html, and hands them to the tracker; rank 0 calls it."""
        training_section(done, read_metrics(self.directory))
        self._note_bad_clips(done)
        folder = self.directory / "figures"
        provenance = self.provenance()
        with writing("the report", self.directory):
            folder.mkdir(exist_ok=True)
            for stem, figure in done.figures.items():
                (folder / f"{stem}.png").write_bytes(style.png(figure))
            report = write_report(
                self.directory / "report.html",
                title,
                done.sections,
                summary=done.summary,
                recipe=dump_recipe(self.recipe),
                provenance=provenance,
            )
        self.tracker.log_metrics(done.metrics, step)
        self.tracker.log_artifact(folder)
        self.tracker.log_artifact(report)
        with writing("the results", self.directory):
            write_results(self.directory / "results.json", done.metrics, provenance)  # last: it marks the run finished
        self.tracker.log_artifact(self.directory / "results.json")

    def _note_bad_clips(self, done: Evaluation) -> None:
        done.metrics |= {f"{part}/bad_clips": float(bad) for part, bad in self.bad_clips.items()}
        found = [f"{bad} of {part}" for part, bad in self.bad_clips.items() if bad]
        if found:
            sentence = f"Left out, since they cannot be decoded: clips, {', '.join(found)} (see `crossgate check`)."
            done.summary = f"{done.summary}\n\n{sentence}".strip()


def run_directory(recipe: Recipe) -> Path:
    """Returns where the run keeps everything.

    Raises:
        UserError: for a run without a name.
    """
    if not recipe.run.name:
        raise UserError("the run has no name", where="run.name", cure="set it, or load the recipe from a file")
    return Path(recipe.run.output) / recipe.run.name


def open_index(recipe: Recipe) -> Index:
    """Returns the recipe's index.

    Raises:
        UserError: when none is named, or it cannot be read.
    """
    if not recipe.data.index:
        raise UserError("no index given", where="data.index", cure="set it to the folder that `crossgate pack` wrote")
    return Index.load(recipe.data.index)


def check_splits(index: Index, recipe: Recipe, required: Collection[Part], used: Collection[Part] = PARTS) -> None:
    """Checks before a run what it would otherwise stumble over at its end.

    Args:
        index: has splits.
        recipe: names some of them.
        required: parts that must not be empty.
        used: parts that the run reads, where they are not empty.

    Raises:
        UserError: naming the recipe's key.
    """
    valid = [name for name, info in index.splits.items() if info.clips]
    _check_apart(recipe)
    for part in PARTS:
        names: tuple[str, ...] = getattr(recipe.data, part)
        where = f"data.{part}"
        if not names and part in required:
            raise UserError("this run needs such a split", where=where, expected=f"some of {', '.join(valid)}")
        for name in names if part in used else ():
            if name not in valid:
                lacks = "has no clips" if name in index.splits else "does not exist"
                without = "" if part in required else f", or set {where}=[] to do without"
                raise UserError(
                    f"split {name!r} {lacks} in {index.store.url}",
                    where=where,
                    cure=f"{nearest(name, valid)}{without}",
                )


def check_shards(index: Index, recipe: Recipe, used: Collection[Part]) -> None:
    """Checks before a run that the shards which it will read, of validation and test too, are where the index says.

    A run on kept features may never read one, so it meets a missing shard where it encodes.

    Raises:
        UserError: naming one that is not there.
    """
    if recipe.finetune.features:
        return
    reads = [(index, [name for part in used for name in getattr(recipe.data, part)])]
    if "train" in used:
        reads += [(Index.load(corpus.index), list(corpus.train or recipe.data.train)) for corpus in recipe.data.mix]
    for corpus, splits in reads:
        if missing := corpus.missing(splits):
            others = f", nor are {len(missing) - 1} others" if missing[1:] else ""
            raise UserError(
                f"shard {missing[0]} of the index is not there{others}",
                where=corpus.store.url,
                cure=f"`crossgate check {corpus.store.url}` names all that is wrong; copy them there, or pack again",
            )


def _check_apart(recipe: Recipe) -> None:
    """A score on clips that were trained on, or that chose the weights, would be no score."""
    part_of: dict[str, Part] = {}
    for part in PARTS:
        for name in getattr(recipe.data, part):
            if part_of.setdefault(name, part) != part:
                raise UserError(
                    f"split {name!r} is in data.{part_of[name]} as well",
                    where=f"data.{part}",
                    expected="splits that have no clip in common",
                    cure=f"pack the manifest anew with a split of its own for {part}",
                )


def check_task(index: Index, task: str) -> None:
    """Raises `UserError` for a label task that the index does not know."""
    if task not in index.vocabularies:
        raise UserError(
            f"the index has no labels '{task}'", where="finetune.task", expected=", ".join(index.vocabularies)
        )


def check_labels(index: Index, recipe: Recipe, *parts: Part) -> None:
    """Checks before a supervised run that validation and test can be scored.

    Raises:
        UserError: naming the part without labels, or with clips of one class only where both are needed.
    """
    task = recipe.finetune.task
    for part in parts:
        names: tuple[str, ...] = getattr(recipe.data, part)
        if not names or task not in index.vocabularies:  # the latter is said where the task is built
            continue
        classes, counts = index.vocabularies[task], index.class_counts(names)[task]
        if not sum(counts):
            raise UserError(
                f"no clip of {', '.join(names)} has a label '{task}'",
                where=f"data.{part}",
                cure="label some of them in the manifest and pack it anew, or name another split",
            )
        if positive_class(classes, recipe.finetune.positive) is not None and 0 in counts:
            raise UserError(
                f"{', '.join(names)} has clips of one class only: '{classes[counts.index(max(counts))]}'",
                where=f"data.{part}",
                expected=f"both {' and '.join(classes)}",
                cure="put a group of the other class into it and pack the manifest anew",
            )


def note_clips(tracker: Tracker, index: Index, recipe: Recipe, part: Part) -> None:
    """Notes the clips of a part of the data as an input of the tracked run: where, which content, how many."""
    names: tuple[str, ...] = getattr(recipe.data, part)
    if names:
        counts = {name: asdict(index.splits[name]) for name in names if name in index.splits}
        profile = {"index_digest": index.digest, "splits": counts, "modalities": index.modalities}
        digest = hashlib.sha256(f"{index.digest} {','.join(names)}".encode()).hexdigest()
        tracker.log_dataset(f"{Path(recipe.data.index).name}:{','.join(names)}", digest, index.store.url, part, profile)


def _index_in_turn(recipe: Recipe, world: World, required: Collection[Part], used: Collection[Part]) -> Index:
    """Rank 0 first: tars that have no index yet get theirs from it, and the others find that."""
    refused: UserError | None = None
    index: Index | None = None
    if world.leads:
        try:
            index = open_index(recipe)
            if strays := index.strays():
                found = f"{len(strays)} tars in {index.store.url} came after their index and are not used ({strays[0]})"
                log.warning("%s: delete index.json and shards.parquet there to use them, in a new run", found)
            check_splits(index, recipe, required, used)
            check_shards(index, recipe, used)
        except UserError as error:
            refused = error
    refused = world.from_leader(refused)
    if refused is not None:
        raise refused
    return index or open_index(recipe)


@contextmanager
def open_run(
    recipe: Recipe, parent: str = "", *, required: Collection[Part], used: Collection[Part] = PARTS
) -> Iterator[RunContext]:
    """Opens world, index and tracker; marks the tracked run finished, failed or killed at the end.

    Args:
        recipe: of the run.
        parent: MLflow id of the run that this one is nested in.
        required, used: as in `check_splits`.

    Raises:
        UserError: for an index that cannot be read, or lacks a split or a shard; the folder is another run's, or
            another start of the run goes on.
    """
    world = current_world()
    index = _index_in_turn(recipe, world, required, used)
    directory = run_directory(recipe)
    with writing("the run's folder", directory):
        refuse_other_run(directory, recipe)
        directory.mkdir(parents=True, exist_ok=True)
    tags = {"index_url": recipe.data.index, "index_digest": index.digest}
    with (
        only_start(directory, world),
        # A trial that is tried anew goes on in the MLflow run that its journal names.
        nullcontext() if parent else nothing_left_of_a_refusal(directory, world),
        open_tracker(recipe, directory, world.rank, tags=tags, parent=parent) as tracker,
    ):
        for part in used:
            note_clips(tracker, index, recipe, part)
        yield RunContext(recipe, world, directory, index, tracker)
