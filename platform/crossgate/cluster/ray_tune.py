"""Ray Tune over recipe overrides: each trial is a fine-tuning run of its own, scored on validation only.

What is done is on disk: a finished trial is not run again, a failed one keeps its reason and is tried anew when the
search is started again. Trials talk to the search through their run directories, and to Tune only by plain reports:
nothing is relayed from a nested Ray Train run, which can leave a trial running for ever (Ray 2.60).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crossgate.cluster.paths import with_absolute_paths
from crossgate.cluster.ray_train import launch, resolve
from crossgate.cluster.session import ray_session, use_reserved
from crossgate.config import Recipe
from crossgate.errors import UserError, writing
from crossgate.recipe import dump_recipe, parse_recipe, recipe_digest, with_overrides
from crossgate.runs.context import open_index
from crossgate.tracking import open_tracker, pinned
from crossgate.training.metrics import read_metrics

Heard = Callable[[Mapping[str, float]], None]
Trial = Callable[[Recipe, Heard, str], dict[str, Any]]
"""``trial(recipe, heard, parent)``: trains, tells `heard` each validation, returns at least ``step``, the step of the
weights that it kept."""

RECORD = "trial.json"


@dataclass(frozen=True)
class TrialRecord:
    """What became of one trial."""

    name: str
    overrides: dict[str, Any]
    directory: str
    status: str = "waiting"
    """finished, failed or waiting."""
    value: float | None = None
    """The search's metric on validation, at the weights that were kept."""
    reason: str = ""
    """Why it failed."""
    seconds: float = 0.0


@dataclass
class SearchResult:
    """The leaderboard of a search."""

    metric: str
    trials: list[TrialRecord] = field(default_factory=list)
    """Best first; failed ones last."""

    def best(self) -> dict[str, Any]:
        """Returns the overrides of the best trial.

        Raises:
            UserError: when no trial finished.
        """
        if not self.trials or self.trials[0].status != "finished":
            reasons = {trial.reason for trial in self.trials if trial.reason} or {"there were none"}
            raise UserError("no trial finished", where="search", cure="; ".join(sorted(reasons)))
        return dict(self.trials[0].overrides)

    def directories(self, key: str) -> dict[str, Path]:
        """Returns value of the key -> run directory of the best finished trial with that value."""
        found: dict[str, Path] = {}
        for trial in self.trials:
            if trial.status == "finished" and key in trial.overrides:
                found.setdefault(str(trial.overrides[key]), Path(trial.directory))
        return found

    def table(self) -> str:
        """Returns the leaderboard as text."""
        rows = [("rank", self.metric, "time", "trial")]
        for place, trial in enumerate(self.trials, start=1):
            value = f"{trial.value:.4f}" if trial.value is not None else trial.status
            settings = ", ".join(f"{key}={value}" for key, value in trial.overrides.items())
            reason = f"  ({trial.reason})" if trial.reason else ""
            rows.append((str(place), value, f"{trial.seconds:.0f} s", settings + reason))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


def search(recipe: Recipe, trial: str = "crossgate.runs.finetune:run_trial") -> SearchResult:
    """Runs every trial of `recipe.search` that has not finished yet and returns the leaderboard.

    Args:
        recipe: of kind search; each trial is its fine-tuning with some keys replaced.
        trial: ``module:function`` of a `Trial`.

    Raises:
        UserError: for a space with a key or value that a recipe cannot have, or when Ray cannot be had.
    """
    recipe = with_absolute_paths(recipe)
    run_dir = Path(recipe.run.output) / recipe.run.name
    trials = plan(recipe)
    with writing("the run's folder", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    with open_tracker(recipe, run_dir) as tracker:
        waiting = [record for record, _ in trials if read_record(record).status != "finished"]
        if waiting:
            _run_trials(recipe, [(r, t) for r, t in trials if r in waiting], trial, tracker.run_id or "")
        result = leaderboard(recipe, [read_record(record) for record, _ in trials])
        board = run_dir / "leaderboard.json"
        board.write_text(json.dumps([asdict(record) for record in result.trials], indent=1))
        if all(record.value is None for record in result.trials):
            raise UserError(
                f"every trial failed ({result.trials[0].reason})", where=board, cure="mend it and start again"
            )
        tracker.log_artifact(board)
        tracker.log_text(result.table(), "leaderboard.txt")
        for record in result.trials:
            if record.value is not None:
                tracker.log_metrics({f"search/{record.name}": record.value}, 0)
    return result


def plan(recipe: Recipe) -> list[tuple[TrialRecord, Recipe]]:
    """Returns the trials: the whole grid, or `samples` distinct draws from it. Bad keys are found here.

    A trial's directory is named by its settings and its index, so that clips packed anew give new trials.
    """
    config = recipe.search
    if not config.space or not all(config.space.values()):
        raise UserError("nothing to try", where="search.space", expected="a recipe key with a list of values")
    points: Sequence[tuple[Any, ...]] = list(itertools.product(*config.space.values()))
    if config.samples:
        points = random.Random(recipe.run.seed).sample(points, min(config.samples, len(points)))
    trials = []
    for point in points:
        overrides = dict(zip(config.space, point, strict=True))
        settings = with_overrides(recipe, {"kind": "finetune", **overrides})
        name = f"{_slug(overrides)}-{_identity(settings)[:6]}"
        settings.tracking = pinned(recipe.tracking, recipe.run.output)  # trials lie deeper than the search itself
        settings.run.name, settings.run.output = name, str(Path(recipe.run.output) / recipe.run.name)
        trials.append((TrialRecord(name, overrides, str(Path(settings.run.output) / name)), settings))
    return trials


def _identity(settings: Recipe) -> str:
    """Returns a digest of all that makes a trial's numbers: its settings and the content of its index."""
    index = open_index(settings).digest if settings.data.index else ""
    return hashlib.sha256(f"{recipe_digest(settings)} {index}".encode()).hexdigest()


def leaderboard(recipe: Recipe, records: Sequence[TrialRecord]) -> SearchResult:
    """Returns the records, best first."""

    def place(record: TrialRecord) -> tuple[bool, float]:
        return record.value is None, -(record.value or 0.0)

    return SearchResult(recipe.search.metric, sorted(records, key=place))


def read_record(record: TrialRecord) -> TrialRecord:
    """Returns what the trial's directory says became of it; the record as it is when it says nothing."""
    path = Path(record.directory) / RECORD
    return TrialRecord(**json.loads(path.read_text())) if path.exists() else record


# ---- under Ray -------------------------------------------------------------------------------------------------


def _run_trials(recipe: Recipe, trials: list[tuple[TrialRecord, Recipe]], trial: str, parent: str) -> None:
    config, cluster = recipe.search, recipe.cluster
    nested = cluster.workers > 1
    own = {"cpu": 0.1} if nested else {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    share = cluster.workers * cluster.cpus_per_worker + 0.1 if nested else config.cpus_per_trial
    gpus = cluster.workers * cluster.gpus_per_worker if nested else config.gpus_per_trial
    side_by_side = min(config.concurrent, len(trials))
    storage, name = Path(recipe.run.output) / recipe.run.name / ".ray", f"{recipe.run.name}-{time.time_ns():x}"
    with ray_session(cluster, side_by_side * share, side_by_side * gpus):
        from ray import tune

        jobs = [
            {"record": asdict(record), "recipe": settings.model_dump(mode="json"), "trial": trial, "parent": parent}
            for record, settings in trials
        ]
        tuner = tune.Tuner(
            tune.with_resources(_nested_trial if nested else _single_trial, own),
            param_space={"job": tune.grid_search(jobs)},
            # Without this bound the drivers of nested runs would take the room that their workers wait for.
            tune_config=tune.TuneConfig(
                max_concurrent_trials=side_by_side,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(storage),
                verbose=0,
            ),
        )
        try:
            results = tuner.fit()
        finally:  # nothing is resumed from it, and it holds the recipe with its tracking server's password
            shutil.rmtree(storage / name, ignore_errors=True)
        for result in (results[place] for place in range(len(results))):
            if result.error is not None and result.config:
                _note_death(TrialRecord(**result.config["job"]["record"]), result.error)


def _name(trial: Any) -> str:
    return trial.config["job"]["record"]["name"]


def _single_trial(config: dict[str, Any]) -> None:
    """A trial in the process that Tune gave it."""
    from ray import tune

    job = config["job"]
    reserved = job["recipe"]["search"]
    use_reserved(reserved["cpus_per_trial"], reserved["gpus_per_trial"])

    def heard(metrics: Mapping[str, float]) -> None:
        tune.report(dict(metrics))

    _recorded(job, lambda recipe: resolve(job["trial"])(recipe, heard, job["parent"]))


def _nested_trial(config: dict[str, Any]) -> None:
    """A trial on several ranks: Tune's process only launches them."""
    job = config["job"]

    def run(recipe: Recipe) -> dict[str, Any]:
        recipe.cluster.launcher = "ray"
        entry = f"{__name__}:{run_silent_trial.__name__}"
        return launch(recipe, entry, {"trial": job["trial"], "parent": job["parent"]})

    _recorded(job, run)


def run_silent_trial(recipe: Recipe, trial: str, parent: str) -> dict[str, Any]:
    """Entry of a nested trial's ranks: nobody listens before the end."""
    return resolve(trial)(recipe, lambda metrics: None, parent)


def _recorded(job: dict[str, Any], run: Callable[[Recipe], dict[str, Any]]) -> None:
    """Runs a trial and writes down what became of it; a failure is a result as well, with its reason."""
    recipe, record = parse_recipe(job["recipe"]), TrialRecord(**job["record"])
    started = time.monotonic()
    outcome: dict[str, Any] = {"status": "finished"}
    try:
        kept = run(recipe)
        outcome["value"] = _value(Path(record.directory), recipe.search.metric, int(kept["step"]))
    except Exception as error:  # one bad setting must not end the search
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        outcome = {"status": "failed", "reason": reason.splitlines()[0]}
    _write_record(record, outcome | {"seconds": round(time.monotonic() - started, 1)})


def _value(run_dir: Path, metric: str, step: int) -> float:
    """Returns the metric at the step whose weights were kept."""
    lines = [line for line in read_metrics(run_dir) if line["step"] == step]
    for line in lines:
        if line.get(metric) is not None:
            return float(line[metric])
    valid = sorted(name for line in lines for name in line if name.startswith("val/"))
    raise UserError(f"trials do not measure '{metric}'", where="search.metric", expected=f"one of {', '.join(valid)}")


def _note_death(record: TrialRecord, error: Exception) -> None:
    if read_record(record).status == "waiting":
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        _write_record(record, {"status": "failed", "reason": f"its process died: {reason}"})


def _write_record(record: TrialRecord, outcome: dict[str, Any]) -> None:
    folder = Path(record.directory)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RECORD}.partial"
    partial.write_text(json.dumps(asdict(record) | outcome))
    partial.replace(folder / RECORD)


def _slug(overrides: Mapping[str, Any]) -> str:
    parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in overrides.items())
    return re.sub(r"[^A-Za-z0-9.-]+", "-", "_".join(parts))[:60].strip("-")
