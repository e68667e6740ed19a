"""The demo: the whole road, from clips to a registered model that predicts, with a report at the end.

Each step goes on where an earlier call was stopped: clips, shards and runs that are there are not made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from crossgate import environment
from crossgate.clips.synth import generate
from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.evaluation import Section, read_results, write_report, write_results
from crossgate.evaluation.tables import Table
from crossgate.progress import progress_bar
from crossgate.recipe import redacted, with_overrides
from crossgate.registry.release import ReleasedModel
from crossgate.runs.compare import compare_models
from crossgate.runs.context import run_directory
from crossgate.runs.demo_recipes import DemoRecipes
from crossgate.runs.pack import PackSettings, pack
from crossgate.runs.predict import format_rows, predict_videos
from crossgate.runs.preview import preview
from crossgate.runs.release import release_run
from crossgate.stream.index import Index

CLIPS, QUICK_CLIPS, FRESH = 960, 72, 3
UNLABELLED = 0.4
_HOW = "Models were selected on validation groups; every score is on test groups that no run trained on."
_QUICK = "A quick run: it shows the road. Its few clips and steps say nothing about the models."


class Searched(Protocol):
    """What the demo asks of a finished search."""

    def best(self) -> dict[str, Any]: ...
    def directories(self, key: str) -> dict[str, Path]: ...
    def table(self) -> str: ...


@dataclass
class Demo:
    """Drives the steps and remembers what to show at the end.

    Attributes:
        out: folder for everything.
        launch: runs a recipe on one or several ranks.
        search: runs a recipe of kind search.
        say: prints a line.
        corpus: manifest of real videos, or None for generated clips.
        quick: a tiny run.
    """

    out: Path
    launch: Callable[[Recipe], object]
    search: Callable[[Recipe], Searched]
    say: Callable[[str], None] = print
    corpus: Path | None = None
    quick: bool = False
    sections: list[Section] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    times: list[tuple[str, float]] = field(default_factory=list)

    def run(self) -> Path:
        """Drives the road and returns the report's path.

        Raises:
            UserError: from any step.
        """
        manifest = self.corpus or self._synth()
        index = self._pack(manifest)
        recipes = self._recipes(index)
        tasks = [task for task in ("action", "violence") if len(index.vocabularies.get(task, ())) > 1]
        if not tasks:
            raise UserError("no task with two classes or more", where=manifest, expected="labels of action or violence")
        pretrained = self._launch("pretrain", recipes.pretrain())
        runs = {}
        for task in tasks:
            gate, trials, settings = self._search(recipes, pretrained, task)
            runs[task] = self._launch(f"fine-tune {task}", recipes.finetune(trials[gate], task, gate))
            self._compare(settings, trials)
        released = [self._release(task, run) for task, run in runs.items()]
        self._predict(released, manifest)
        return self._report(pretrained, runs, released)

    # ---- steps -------------------------------------------------------------------------------------------------

    def _synth(self) -> Path:
        clips = QUICK_CLIPS if self.quick else CLIPS
        with self._step(
            "synth", f"{clips} clips of figures that act, with sound and true depth, some of them unlabelled"
        ):
            with progress_bar("clips") as step:
                return generate(
                    self.out / "clips", clips=clips, val=0.08, test=0.12, unlabelled=UNLABELLED, progress=step
                )

    def _pack(self, manifest: Path) -> Index:
        url = str(self.out / "shards")
        with self._step("pack", f"{manifest} -> WebDataset shards with an index"):
            with progress_bar("clips") as step:
                index = pack(manifest, url, PackSettings(), progress=step)
            self.say(index.summary())
        with self._step("preview", "a contact sheet of some clips"):
            self.say(f"wrote {preview(url, self.out / 'preview.png')}")
        return index

    def _recipes(self, index: Index) -> DemoRecipes:
        cores = environment.usable_cores()
        splits = tuple(name for name in ("train", "unlabelled") if name in index.splits)
        return DemoRecipes(
            self.out / "recipes",
            str(self.out / "shards"),
            # Of the labelled clips: a modality that only others have cannot be fine-tuned.
            modalities=tuple(name for name, clips in index.select(["train"]).modalities.items() if clips),
            pretrain_splits=splits,
            output=self.out / "runs",
            generated=self.corpus is None,
            workers=min(2, cores),
            quick=self.quick,
        )

    def _launch(self, title: str, recipe: Recipe) -> Path:
        with self._step(title, f"run {recipe.run.name}"):
            self.launch(recipe)
            directory = run_directory(recipe)
            self.say(f"report: {directory / 'report.html'}")
        return directory

    def _search(self, recipes: DemoRecipes, pretrained: Path, task: str) -> tuple[str, dict[str, Path], Recipe]:
        """Returns the chosen gate, the directory of each gate's trial and the recipe."""
        with self._step(f"search {task}", "three gates on the frozen encoders, selected on validation groups"):
            recipe = recipes.search(pretrained, task)
            found = self.search(recipe)
            self.say(found.table())
        return found.best()["model.fusion.name"], found.directories("model.fusion.name"), recipe

    def _compare(self, recipe: Recipe, trials: dict[str, Path]) -> None:
        """The gates on the same frozen encoders; the fine-tuned winner's own comparison is in its report."""
        task = recipe.finetune.task
        with self._step(f"compare {task}", "one modality, their mean and each gate on the same test groups"):
            changes = {"run.name": f"compare-{task}", "tracking.enabled": False}
            _, table, section = compare_models(with_overrides(recipe, changes), trials)
            self.sections.append(section)
            self.tables.append(table)

    def _release(self, task: str, run: Path) -> ReleasedModel:
        with self._step(f"release {task}", "into the MLflow registry"):
            released = release_run(run)
            if released.decision is not None:
                self.say(released.decision.text())
            self.say(f"registered {released.name} version {released.version} as {released.uri}")
        return released

    def _predict(self, released: list[ReleasedModel], manifest: Path) -> None:
        with self._step("predict", "on clips that no run has seen"):
            videos, depth, units = self._fresh_videos(manifest)
            for model in released:
                frame = predict_videos(model.uri, videos, depth=depth, units=units, tracking_uri=model.tracking_uri)
                text = format_rows(frame)
                self.say(f"{model.uri}\n{text}\n")
                self.sections.append(Section(f"Predictions of {model.name}", code=text))

    def _fresh_videos(self, manifest: Path) -> tuple[list[str], list[str] | None, list[str]]:
        """Returns videos, the depth file of each if any has one, and what a step of it means."""
        from crossgate.clips.manifest import read_manifest

        if self.corpus is None:
            manifest = generate(self.out / "fresh", clips=36, seed=1_000_003)
        every = read_manifest(manifest).rows
        rows = [row for row in every if self.corpus is None or row.split == "test"][:FRESH]
        depth = [str(row.depth_path or "") for row in rows]
        return [str(row.path) for row in rows], depth if any(depth) else None, [row.depth_unit for row in rows]

    # ---- words -------------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self, name: str, about: str) -> Iterator[None]:
        self.say(f"\n== {name}: {about}")
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.times.append((name, seconds))
        self.say(f"   {name} took {seconds:.0f} s")

    def _report(self, pretrained: Path, runs: dict[str, Path], released: list[ReleasedModel]) -> Path:
        rows = [[name, f"{seconds:.0f}"] for name, seconds in self.times]
        rows.append(["in all", f"{sum(seconds for _, seconds in self.times):.0f}"])
        timing = Table(["step", "seconds"], rows, "wall time of each step of this call")
        self.sections.append(Section("Time", tables=[timing]))
        said = self._results(pretrained, runs)
        path = write_report(
            self.out / "report.html",
            "crossgate demo",
            self.sections,
            summary="\n\n".join([_QUICK if self.quick else _HOW, *said]),
            provenance={name: run / "report.html" for name, run in {"pretrain": pretrained, **runs}.items()},
        )
        for table in [*self.tables, timing]:
            self.say(f"\n{table.caption}\n{table.text()}")
        self.say("\n" + "\n".join(said))
        self.say(f"\nreport: {path}\npicture of clips: {self.out / 'preview.png'}\n")
        server = redacted(released[0].tracking_uri)
        self.say("go on with:")
        self.say(f"  crossgate pretrain --config {self.out}/recipes/pretrain.yaml training.epochs=40")
        self.say(f"  crossgate predict {released[0].uri} VIDEO.mp4 --tracking-uri {server}")
        self.say(f"  mlflow ui --backend-store-uri {server}")
        return path

    def _results(self, pretrained: Path, runs: dict[str, Path]) -> list[str]:
        """Writes every number of the demo to one file, and returns the few that matter as sentences."""
        numbers = {f"seconds/{name}": seconds for name, seconds in self.times}
        for name, run in {"pretrain": pretrained, **runs}.items():
            metrics, _ = read_results(run / "results.json")
            numbers |= {f"{name}/{key}": value for key, value in metrics.items() if key.startswith("test/")}
        write_results(self.out / "results.json", numbers)
        return [sentence(task, numbers) for task in runs for sentence in (_probed, _scored)]


def _scored(task: str, numbers: dict[str, float]) -> str:
    name = "average_precision" if f"{task}/test/average_precision" in numbers else "accuracy"
    score = f"{task}/test/{name}"
    chance = 100 * numbers[f"{task}/test/chance_{name if name != 'accuracy' else 'majority'}"]
    said = f"{100 * numbers[score]:.1f} % ({_between(numbers, score)}), chance {chance:.1f} %"
    return f"{task}: the fine-tuned model's {name.replace('_', ' ')} is {said}"


def _probed(task: str, numbers: dict[str, float]) -> str:
    name = f"pretrain/test/linear_probe/{task}/all/accuracy"
    if f"{name}_gain" not in numbers:
        return f"{task}: too few labelled clips for a linear probe"
    random = numbers[f"pretrain/test/linear_probe_random/{task}/all/accuracy"]
    return (
        f"{task}: a linear probe on the pretrained encoders is right on {100 * numbers[name]:.1f} % of the test clips, "
        f"on random ones on {100 * random:.1f} % (gain in points: {_between(numbers, f'{name}_gain', '+')})"
    )


def _between(numbers: dict[str, float], name: str, sign: str = "") -> str:
    if f"{name}_low" not in numbers:
        return "too few groups for an interval"
    low, high = (100 * numbers[f"{name}_{end}"] for end in ("low", "high"))
    return f"95 % interval {low:{sign}.1f} to {high:{sign}.1f}"
