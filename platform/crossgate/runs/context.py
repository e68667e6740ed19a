"""What every kind of run opens first and closes last: world, run directory, index, tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.evaluation import Evaluation, write_report, write_results
from crossgate.recipe import dump_recipe
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader
from crossgate.tracking import Tracker, open_tracker
from crossgate.tracking.provenance import code_version
from crossgate.training.world import World, current_world


@dataclass
class RunContext:
    """The open resources of a run. Rank 0 alone writes what a run writes once."""

    recipe: Recipe
    world: World
    directory: Path
    index: Index
    tracker: Tracker

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
            micro_batch=recipe.data.global_batch // world.ranks // recipe.engine.accumulation,
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
        folder = self.directory / "figures"
        folder.mkdir(exist_ok=True)
        for stem, figure in done.figures.items():
            figure.savefig(folder / f"{stem}.png", dpi=144)
        provenance = self.provenance()
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
        write_results(self.directory / "results.json", done.metrics, provenance)  # last: it marks the run finished
        self.tracker.log_artifact(self.directory / "results.json")


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


@contextmanager
def open_run(recipe: Recipe, parent: str = "") -> Iterator[RunContext]:
    """Opens world, index and tracker; marks the tracked run finished, failed or killed at the end.

    Args:
        recipe: of the run.
        parent: MLflow id of the run that this one is nested in.
    """
    index = open_index(recipe)
    world = current_world()
    directory = run_directory(recipe)
    directory.mkdir(parents=True, exist_ok=True)
    tags = {"index_url": recipe.data.index, "index_digest": index.digest}
    with open_tracker(recipe, directory, world.rank, tags=tags, parent=parent) as tracker:
        yield RunContext(recipe, world, directory, index, tracker)
