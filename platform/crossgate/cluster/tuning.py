"""What Ray Tune is given: a searcher of our points, successive halving that remembers, and a live leaderboard.

Importing this module imports Ray.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from crossgate.cluster.trials import NotYet, SearchResult, TrialRecord, read_record, reports_of, write_record
from crossgate.training.progress import duration

log = logging.getLogger("crossgate.search")

Job = dict[str, Any]
STEP, VALUE = "step", "value"
_LONGEST = 10**12  # no trial has as many steps: rungs go on as long as trials do
_QUIET_S = 10.0
_KEEP_S = 30.0
_ALIVE_S = 60.0
_SHOWN = 3


def record_of(trial: Any) -> TrialRecord:
    """Returns the record that a trial of Tune's was made for."""
    return TrialRecord(**trial.config["job"]["record"])


class Jobs(Searcher):
    """Hands out one job after another, and tells how each ended.

    Args:
        draw: returns the next job, or None when there is none.
        tell: gets the record of each trial that ended.
    """

    def __init__(self, draw: Callable[[], Job | None], tell: Callable[[TrialRecord], None]) -> None:
        super().__init__(metric=VALUE, mode="max")
        self._draw, self._tell = draw, tell
        self._running: dict[str, TrialRecord] = {}

    def suggest(self, trial_id: str) -> Any:
        try:
            job = self._draw()
        except NotYet:
            return None
        if job is None:
            return Searcher.FINISHED
        self._running[trial_id] = TrialRecord(**job["record"])
        return {"job": job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        record = read_record(self._running.pop(trial_id))
        self._tell(replace(record, status="failed") if error and record.status == "waiting" else record)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of it on disk, which nothing is resumed from

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is known is in the trials' directories."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class Halving(ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2018) over optimiser steps, by validations on the way.

    A trial's last validation is no report, so that whoever arrives there has finished.

    Args:
        grace: steps before any trial is stopped.
        reduction: of so many trials at a rung one goes on.
        kill: whether Tune ends the process of a trial that is stopped; else that one reads its record, and ends itself.
    """

    def __init__(self, grace: int, reduction: float, kill: bool = True) -> None:
        super().__init__(
            time_attr=STEP,
            metric=VALUE,
            mode="max",
            max_t=_LONGEST,
            grace_period=grace,
            reduction_factor=reduction,
            stop_last_trials=False,  # else a report above several rungs is compared with those of lower ones
        )
        self._kill = kill

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def remember(self, record: TrialRecord) -> None:
        """Lets the reports of a trial of an earlier start take part."""
        past = _Past(f"past-{record.name}")
        super().on_trial_add(None, past)  # type: ignore[arg-type]
        self._replay(past, record)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._replay(trial, record_of(trial))  # a trial that goes on from its checkpoint

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        record = record_of(trial)
        if read_record(record).status == "pruned":  # and has not ended itself yet
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        if read_record(record).status != "finished":  # ranks may come to their end before the driver is stopped
            write_record(
                record,
                status="pruned",
                value=result[VALUE],
                step=result[STEP],
                seconds=round(float(result.get("time_total_s", 0.0)), 1),
            )
        return TrialScheduler.STOP if self._kill else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if read_record(record_of(trial)).status == "pruned":  # steps that it did until it ended itself do not count
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, result)

    def _replay(self, trial: Any, record: TrialRecord) -> None:
        for step, value in reports_of(record.directory):
            super().on_trial_result(None, trial, {STEP: step, VALUE: value})  # type: ignore[arg-type]


class _Past:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class Board(tune.Callback):
    """The leaderboard while the search runs: a table on a terminal, a line now and then in a log; and for MLflow.

    Args:
        standing: returns the leaderboard as it is on disk.
        keep: gets it every half minute while anything happens; what it raises is told once and ends nothing.
        total: how many there are in all.
        unit: what is counted.
        logs: where the trials write what they say, in words.
    """

    def __init__(
        self,
        standing: Callable[[], SearchResult],
        keep: Callable[[SearchResult], None],
        total: int,
        unit: str = "trials",
        logs: str = "",
    ) -> None:
        self._standing, self._keep, self._total, self._unit = standing, keep, total, unit
        self._begun = self._said = time.monotonic()
        self._ended, self._kept = 0, -math.inf
        self._complained = False
        self._live: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        begun = f"{total} {unit} to run" + (f"; each writes to {logs}" if logs else "")
        if self._live is not None:
            self._live.update(begun, refresh=True)
        else:
            print(begun, file=sys.stderr, flush=True)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as of `Jobs`

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._show(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._show(trials)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def _show(self, trials: list[Any]) -> None:
        ended = sum(trial.is_finished() for trial in trials)
        now = time.monotonic()
        wait = _ALIVE_S if ended == self._ended else _QUIET_S if ended < self._total else 0.0
        quiet = self._live is None and now - self._said < wait
        due = now - self._kept >= _KEEP_S
        if quiet and not due:
            return
        result = self._standing()
        if due:
            self._kept = now
            self._keep_aside(result)
        if quiet:
            return
        self._said, self._ended = now, ended
        said, left = f"{ended}/{self._total} {self._unit} ended", ""
        if 0 < ended < self._total:
            left = f", ETA {duration((now - self._begun) / ended * (self._total - ended))}"
        if self._live is not None:
            self._live.update(f"{result.table()}\n{said}{left}{_under_way(trials)}", refresh=True)
            return
        if result.trials and result.trials[0].value is not None:
            best = result.trials[0]
            said += f", best {result.metric} {best.value:.4f}: {best.settings}"
        print(f"{said}{left}{_under_way(trials)}", file=sys.stderr, flush=True)

    def _keep_aside(self, result: SearchResult) -> None:
        try:
            self._keep(result)
        except Exception as error:  # the trials go on, whatever became of the table
            if not self._complained:
                log.warning("the leaderboard is not kept while the search goes on: %s", error)
            self._complained = True


def _under_way(trials: list[Any]) -> str:
    """Returns which trials run and how far they are, in words."""
    running = [trial for trial in trials if trial.status == "RUNNING"]
    shown = []
    for trial in running[:_SHOWN]:
        seen, record = trial.last_result or {}, record_of(trial)
        at = f" (step {seen[STEP]}: {seen[VALUE]:.4f})" if VALUE in seen else ""
        again = f", {record.name.removeprefix(f'{record.repeats}-')}" if record.repeats else ""
        shown.append(f"{record.settings or 'the recipe as it is'}{again}{at}")
    more = f" and {len(running) - _SHOWN} more" if len(running) > _SHOWN else ""
    return f"; under way: {'; '.join(shown)}{more}" if shown else ""
