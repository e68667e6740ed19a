"""Ray Tune over recipe overrides: each trial is a fine-tuning run of its own, scored on validation only.

What is done is on disk: a finished or pruned trial is not run again, one that was under way goes on from its
checkpoint, a failed one keeps its reason and is tried anew when the search is started again. Trials talk to the search
through their run directories, and to Tune only by plain reports: nothing is relayed from a nested Ray Train run, which
can leave a trial running for ever (Ray 2.60).
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crossgate.cluster.exchange import settings_of
from crossgate.cluster.explore import ENDED, Exploration, Finals, Planned, exploration
from crossgate.cluster.leaderboard import (
    BOARD,
    averages,
    fusion_of,
    log_board,
    publish,
    verdict_on,
)
from crossgate.cluster.paths import with_absolute_paths
from crossgate.cluster.ray_train import launch, resolve
from crossgate.cluster.room import Need
from crossgate.cluster.session import ray_session, use_reserved, workers_need
from crossgate.cluster.trials import (
    SCHEDULE,
    SearchResult,
    TrialRecord,
    leaderboard,
    note_report,
    read_record,
    trial_of,
    write_record,
)
from crossgate.config import Recipe
from crossgate.errors import Passing, UserError, first_line, writing
from crossgate.recipe import parse_recipe, with_overrides
from crossgate.runs.context import note_clips, open_index, run_directory
from crossgate.runs.finetune import LOG
from crossgate.runs.fusions import AVERAGES, GATE, average_for
from crossgate.runs.ownership import only_start
from crossgate.runs.trial_checks import check_trials
from crossgate.tracking import Status, Tracker, conclude, open_tracker, pinned
from crossgate.training.checkpoint import refuse_other_run, store_recipe
from crossgate.training.metrics import read_metrics
from crossgate.training.requests import Preempted

log = logging.getLogger("crossgate.search")

Heard = Callable[[int, Mapping[str, float]], None]
Trial = Callable[..., dict[str, Any]]
"""``trial(recipe, heard, parent)``: trains, tells `heard` each validation before the last step, returns at least
``step``, the step of the weights that it kept. One of a population gets ``until`` besides: a step to pause at, and to
return, with a checkpoint there."""

_SCRATCH = ".ray"
_LOOK_S = 1.0
_DRIVER_CPUS = 0.1  # of a trial on several ranks: it only waits for them


def search(recipe: Recipe, trial: str = "crossgate.runs.finetune:run_trial") -> SearchResult:
    """Runs what a search still lacks and returns its leaderboard, with a verdict where gates were compared.

    Args:
        recipe: of kind search; each trial is its fine-tuning with some keys replaced.
        trial: ``module:function`` of a `Trial`.

    Raises:
        UserError: for a space with a key or value that a recipe cannot have, while another start of the search goes on,
            when Ray cannot be had, or, after everything is written, where no trial finished.
    """
    recipe = with_absolute_paths(recipe)
    run_dir = run_directory(recipe)
    source = exploration(recipe)
    index = open_index(recipe) if recipe.data.index else None
    if index is not None:
        check_trials(recipe, index)
    with writing("the run's folder", run_dir):
        refuse_other_run(run_dir, recipe)
        run_dir.mkdir(parents=True, exist_ok=True)
    with only_start(run_dir), open_tracker(recipe, run_dir) as tracker:
        store_recipe(run_dir, recipe)
        shutil.rmtree(run_dir / _SCRATCH, ignore_errors=True)  # of a start that was killed: a password may be in it
        classes: Sequence[str] = ()
        if index is not None:
            classes = index.vocabularies.get(recipe.finetune.task, ())
            note_clips(tracker, index, recipe, "train")
            note_clips(tracker, index, recipe, "val")
        with ExitStack() as stack:
            stage = _Stage(recipe, trial, tracker, stack)
            stage.explore(source)
            finals = Finals(_finals(recipe, source.records()), lambda: _explored(recipe, source.records()))
            stage.repeat(finals)
        records = finals.records()
        result = leaderboard(recipe, records)
        verdict = verdict_on(recipe, result, records, classes) if GATE in recipe.search.space else None
        result.verdict = verdict.said if verdict else ""
        publish(recipe, result, verdict, tracker)
        _end_tracked_runs(recipe, records)
        if result.winner is None:
            why = next((f" ({one.reason})" for one in result.trials if one.reason), "")
            raise UserError(f"no trial finished{why}", where=run_dir / BOARD, cure="mend it and start again")
    return result


def _finals(recipe: Recipe, explored: Sequence[TrialRecord]) -> list[Planned]:
    """Returns the best few, and what they must be better than, once a seed.

    Those are averages where there are gates, and the last settings of the best schedule held from the beginning. What
    was explored as `search.explore` says is trained in full here, as trials of their own.
    """
    best = [one for one in leaderboard(recipe, explored).trials if one.status == "finished"]
    if not best:
        return []
    gates = GATE in recipe.search.space
    seeds = range(recipe.search.seeds)
    # Averages have their seeds in any case: they take no finalist's place, whether or not they were run to their end.
    rivals = [one for one in best if not (gates and averages(recipe, one))][: recipe.search.finalists]
    cheap = bool(recipe.search.explore)
    finalists = rivals if recipe.search.seeds > 1 or cheap else []
    finals = [trial_of(recipe, one.overrides, seed, "" if cheap else one.name) for one in finalists for seed in seeds]
    if finalists and SCHEDULE in finalists[0].overrides:
        finals += [trial_of(recipe, settings_of(finalists[0].overrides), seed) for seed in seeds]
    if gates:
        finals += [trial_of(recipe, one, seed) for one in _averages(recipe, explored, rivals) for seed in seeds]
    drawn = {one.name for one in explored}
    return [(replace(record, added=not {record.name, record.repeats} & drawn), settings) for record, settings in finals]


def _averages(recipe: Recipe, explored: Sequence[TrialRecord], rivals: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Returns the settings of the averages to be better than: those tried, and those that mix what the rivals mix.

    Each at its best: of a finished trial, a pruned one, or those of the best rival.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in leaderboard(recipe, explored).trials:
        if averages(recipe, one) and one.value is not None:
            found.setdefault(fusion_of(recipe, one), one.overrides)
    space = recipe.search.space
    for one in rivals:
        name = average_for(fusion_of(recipe, one))
        kept = {key: value for key, value in one.overrides.items() if not getattr(space[key], "when", None)}
        found.setdefault(name, kept | {GATE: name})
    return [found[name] for name in AVERAGES if name in found]


def _explored(recipe: Recipe, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Returns them as a leaderboard has them: what was trained for less is not ranked among those trained in full."""
    if not recipe.search.explore:
        return list(records)
    return [replace(one, status="explored") if one.status == "finished" else one for one in records]


_ENDS: dict[str, Status] = {"finished": "FINISHED", "explored": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


def _end_tracked_runs(recipe: Recipe, records: Sequence[TrialRecord]) -> None:
    """A trial that Tune stopped cannot end its MLflow run by itself; one that ended while the server was away has not
    sent everything."""
    ended = [one for one in records if recipe.tracking.enabled and one.status in _ENDS]
    for place, record in enumerate(ended):
        try:
            conclude(record.directory, pinned(recipe.tracking, recipe.run.output), _ENDS[record.status])
        except Exception as error:  # the search has its result: no server may take that away, nor keep it waiting
            left = len(ended) - place
            log.warning("MLflow may lack the end of %d trials (%s): start again later", left, first_line(error))
            return


# ---- under Ray -------------------------------------------------------------------------------------------------


class _Stage:
    """Runs trials under Tune; Ray is started when the first one is there, and ends with the search.

    Args:
        recipe: of the search.
        trial: ``module:function`` of a `Trial`.
        tracker: of the search's run.
        stack: that Ray ends with.
    """

    def __init__(self, recipe: Recipe, trial: str, tracker: Tracker, stack: ExitStack) -> None:
        self._recipe, self._trial, self._tracker, self._stack = recipe, trial, tracker, stack
        config, cluster = recipe.search, recipe.cluster
        self._nested = cluster.workers > 1
        if self._nested:
            workers = workers_need(cluster, cluster.fewest_workers)
            self._need = Need("one trial", (*workers.shares, (_DRIVER_CPUS, 0.0)), workers.keys)
        else:
            share = config.cpus_per_trial, config.gpus_per_trial
            self._need = Need("one trial", (share,), "search.cpus_per_trial, search.gpus_per_trial")
        self._session: Any = None

    def explore(self, source: Exploration) -> None:
        """Runs the trials that a search draws, with the scheduler that its recipe names."""
        config = self._recipe.search
        explored = with_overrides(self._recipe, config.explore)  # whose first validation may come earlier
        grace = config.grace or explored.training.eval_every or 1
        unit = "stretches of trials" if config.scheduler == "pbt" else "trials"
        self._run(source, grace if config.scheduler == "asha" else 0, unit)

    def repeat(self, finals: Finals) -> None:
        """Runs the trials of a list to their end."""
        self._run(finals, unit="final trials")

    def _run(self, source: Exploration, grace: int = 0, unit: str = "trials") -> None:
        """Runs trials until there is none left.

        Args:
            source: of the trials.
            grace: steps before halving may stop one (0: none is stopped).
            unit: what is counted, for people.
        """
        if not source.left:
            return
        side_by_side = min(self._recipe.search.concurrent, source.left)
        self._start_ray(side_by_side)
        from ray import tune

        config = self._recipe.search
        own = {"cpu": _DRIVER_CPUS} if self._nested else {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
        storage = run_directory(self._recipe) / _SCRATCH
        name = f"{self._recipe.run.name}-{time.time_ns():x}"
        tuner = tune.Tuner(
            tune.with_resources(_nested_trial if self._nested else _single_trial, own),
            tune_config=self._tuning(source, grace, side_by_side),
            run_config=tune.RunConfig(
                name=name, storage_path=str(storage), verbose=0, callbacks=[self._board(source, unit)]
            ),
        )
        try:
            results = tuner.fit()
        finally:  # nothing is resumed from it, and it holds the recipe with its tracking server's password
            shutil.rmtree(storage / name, ignore_errors=True)
        for result in (results[place] for place in range(len(results))):
            if result.error is not None and result.config:
                _note_death(TrialRecord(**result.config["job"]["record"]), result.error)

    def _start_ray(self, side_by_side: int) -> None:
        if self._session is None:
            cpus = side_by_side * sum(cpus for cpus, _ in self._need.shares)
            self._session = self._stack.enter_context(ray_session(self._recipe.cluster, cpus, self._need))

    def _tuning(self, source: Exploration, grace: int, side_by_side: int) -> Any:
        """Returns what Tune is told of the trials and of their order."""
        from ray import tune

        from crossgate.cluster.tuning import Halving, Jobs

        def job() -> dict[str, Any] | None:
            planned = source.draw()
            return self._job(*planned, halving=bool(grace)) if planned is not None else None

        halving = Halving(grace, self._recipe.search.reduction, kill=not self._nested) if grace else None
        if halving is not None:
            for record in source.records():
                if record.status in ENDED:
                    halving.remember(record)
        return tune.TuneConfig(
            search_alg=Jobs(job, source.tell),
            num_samples=source.left,
            scheduler=halving,
            # Without this bound the drivers of nested runs would take the room that their workers wait for.
            max_concurrent_trials=side_by_side,
            reuse_actors=not self._nested,  # to import everything anew takes longer than many a trial
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        )

    def _board(self, source: Exploration, unit: str) -> Any:
        """Returns what shows and keeps the leaderboard meanwhile."""
        from crossgate.cluster.tuning import Board

        logs = str(run_directory(self._recipe) / "TRIAL" / LOG)
        return Board(lambda: leaderboard(self._recipe, source.records()), self._keep, source.left, unit, logs)

    def _keep(self, result: SearchResult) -> None:
        """Sends the leaderboard to MLflow; while the server is away, stale ones would only pile up."""
        if not self._tracker.away:
            log_board(result, self._tracker)

    def _job(self, record: TrialRecord, settings: Recipe, halving: bool) -> dict[str, Any]:
        tree = settings.model_dump(mode="json")
        return {
            "record": asdict(record),
            "recipe": tree,
            "trial": self._trial,
            "parent": self._tracker.run_id,
            "halving": halving,
        }


def _name(trial: Any) -> str:
    record = trial.config["job"]["record"]
    return f"{record['name']}-to-{record['until']}" if record["until"] else record["name"]


def _single_trial(config: dict[str, Any]) -> None:
    """A trial in the process that Tune gave it."""
    job = config["job"]
    reserved = job["recipe"]["search"]
    use_reserved(reserved["cpus_per_trial"], reserved["gpus_per_trial"])
    heard = _reporter(TrialRecord(**job["record"]), reserved["metric"])
    _recorded(job, lambda recipe: resolve(job["trial"])(recipe, heard, job["parent"], **_pause(job)))


def _pause(job: dict[str, Any]) -> dict[str, int]:
    """Returns the step that a trial of a population pauses at, as an argument of `Trial`; nothing at the run's end."""
    until = job["record"]["until"]
    return {"until": until} if until and until < job["recipe"]["training"]["steps"] else {}


def _reporter(record: TrialRecord, metric: str) -> Heard:
    """Returns what tells Tune, and the trial's directory, how far it is."""
    from ray import tune

    def heard(step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(metric)
        if value is not None and math.isfinite(value):
            note_report(record.directory, step, value)
            tune.report({"step": step, "value": value})

    return heard


def _nested_trial(config: dict[str, Any]) -> None:
    """A trial on several ranks: Tune's process launches them and reads in their run directory how far they are.

    It ends them itself when it is pruned. Were it killed, their placement group would be left to a cleaner of Ray's,
    which asks the state API: a Ray without a dashboard has none, and their room would never be free again.
    """
    job = config["job"]
    record = TrialRecord(**job["record"])
    heard = _reporter(record, job["recipe"]["search"]["metric"])

    def run(recipe: Recipe) -> dict[str, Any]:
        recipe.cluster.launcher = "ray"
        entry = f"{__name__}:{run_silent_trial.__name__}"
        outcome: list[Any] = []
        stop = threading.Event()

        def ranks() -> None:
            arguments = {"trial": job["trial"], "parent": job["parent"], **_pause(job)}
            try:
                outcome.append(launch(recipe, entry, arguments, stop))
            except BaseException as error:  # raised where the trial is recorded
                outcome.append(error)

        thread = threading.Thread(target=ranks, daemon=True)
        thread.start()
        told = -1
        while thread.is_alive():
            thread.join(_LOOK_S)
            if _pruned(job):
                stop.set()
                continue
            lines = read_metrics(Path(record.directory))
            for line in lines:
                # A validation with nothing after it may be the last, at which no trial is stopped.
                new = told < line["step"] < lines[-1]["step"] and recipe.search.metric in line
                if new and thread.is_alive() and not _pruned(job):
                    told = line["step"]
                    heard(told, line)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    _recorded(job, run)


def run_silent_trial(recipe: Recipe, trial: str, parent: str, **pause: int) -> dict[str, Any]:
    """Entry of a nested trial's ranks: what they measure is in the run's directory."""
    return resolve(trial)(recipe, lambda step, metrics: None, parent, **pause)


def _recorded(job: dict[str, Any], run: Callable[[Recipe], dict[str, Any]]) -> None:
    """Runs a trial and writes down what became of it; a failure is a result as well, with its reason.

    That it was pruned has been written down by whoever decided so.
    """
    recipe, record = parse_recipe(job["recipe"]), TrialRecord(**job["record"])
    started = time.monotonic()
    outcome: dict[str, Any] = {"status": "paused" if _pause(job) else "finished"}
    try:
        step = int(_through_outages(run, recipe)["step"])
        outcome |= {"step": step, "value": _value(Path(record.directory), recipe.search.metric, step)}
    except Exception as error:  # one bad setting must not end the search
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        outcome = {"status": "failed", "reason": reason.splitlines()[0]}
    except Preempted:
        if not _pruned(job):
            raise
    if not _pruned(job):
        write_record(record, **outcome, seconds=round(record.seconds + time.monotonic() - started, 1))


def _pruned(job: dict[str, Any]) -> bool:
    """Whether halving has stopped the trial: this time, for one that an earlier stage pruned may be trained in full."""
    return job["halving"] and read_record(TrialRecord(**job["record"])).status == "pruned"


def _through_outages(run: Callable[[Recipe], dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Starts a trial again, which goes on from its checkpoint, where a store did not answer."""
    for _ in range(recipe.cluster.max_failures):
        try:
            return run(recipe)
        except Passing as error:
            log.warning("%s is started again: %s", recipe.run.name, error)
    return run(recipe)


def _value(run_dir: Path, metric: str, step: int) -> float:
    """Returns the metric at the step whose weights were kept."""
    lines = [line for line in read_metrics(run_dir) if line["step"] == step]
    for line in lines:
        if line.get(metric) is not None:
            return float(line[metric])
        if metric in line:  # null stands for what is not finite
            raise UserError(f"{metric} is not a finite number at step {step}")
    valid = sorted(name for line in lines for name in line if name.startswith("val/"))
    raise UserError(f"trials do not measure '{metric}'", where="search.metric", expected=f"one of {', '.join(valid)}")


def _note_death(record: TrialRecord, error: Exception) -> None:
    if read_record(record).status == "waiting":
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        write_record(record, status="failed", reason=f"its process died: {reason}")
