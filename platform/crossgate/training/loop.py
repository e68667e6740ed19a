"""The one loop. It knows batches and losses, and neither modalities nor clusters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.recipe import Stretch, as_of, recipe_digest
from crossgate.training.accumulate import contrasts, step_as_one
from crossgate.training.checkpoint import (
    Checkpoint,
    Manifest,
    bring,
    bring_newest,
    checkpoint_path,
    claim_run_dir,
    damage_of,
    has_weights,
    load_weights,
    newest_whole,
    prune,
    refuse_all_damaged,
    restore,
    roll_back,
    save_checkpoint,
)
from crossgate.training.driver import Driver
from crossgate.training.engine import build_engine, full_weights, loss_scale
from crossgate.training.feed import Feed
from crossgate.training.meters import Meters, peak_flops
from crossgate.training.metrics import MetricsFile
from crossgate.training.nonfinite import NonFinitePolicy, Verdict
from crossgate.training.profile import StepProfile
from crossgate.training.progress import ProgressLine
from crossgate.training.randomness import random_states_kept
from crossgate.training.requests import STOP, Preempted, Requests, heeding_signals
from crossgate.training.schedule import LearningRates
from crossgate.training.trace import StepTrace
from crossgate.training.upload import GRACE_S, Uploader, checkpoint_store
from crossgate.training.watchdog import Phase, Watchdog
from crossgate.training.window import Window
from crossgate.training.world import Flag, World

Validate = Callable[[Any, int], dict[str, float]]


class Loader(Protocol):
    """What the loop asks of a loader: this rank's micro-batches, for ever, from where its state says."""

    @property
    def steps_per_epoch(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def settle(self, gather: Callable[[Any], list[Any]]) -> None: ...
    def meters(self) -> dict[str, float]: ...


class MetricSink(Protocol):
    """What the loop asks of a tracker."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...


@dataclass(frozen=True)
class Selection:
    """Which validation metric decides what the best weights are."""

    metric: str = "val/loss"
    better: Literal["lower", "higher"] = "lower"

    def value(self, metrics: Mapping[str, float]) -> float:
        """Returns the deciding value.

        Raises:
            UserError: when validation did not measure it.
        """
        if self.metric not in metrics:
            raise UserError(
                f"validation has no metric '{self.metric}'", expected=f"one of {', '.join(sorted(metrics))}"
            )
        return metrics[self.metric]

    def improves(self, value: float, best: float | None) -> bool:
        """Whether the value beats the best so far; NaN never does."""
        if math.isnan(value):
            return False
        return best is None or (value < best if self.better == "lower" else value > best)


@dataclass(frozen=True)
class FitResult:
    """How a run ended. The task that was given to `fit` holds the best weights on the run's device."""

    step: int
    """Optimiser steps done."""
    metrics: dict[str, float]
    """Last validation."""
    best_step: int
    """Step whose weights are the best by validation (the last one without validation)."""
    best_value: float | None
    resumed_from: int
    """Step that this start went on from (0: from the beginning)."""
    model_dir: Path
    """Where the model of the best weights is, if `save_model` was given."""


def fit(
    task: Any,
    loader: Loader,
    recipe: Recipe,
    run_dir: Path,
    world: World,
    *,
    tracker: MetricSink | None = None,
    validate: Validate | None = None,
    selection: Selection | None = None,
    save_model: Callable[[Any, Path], object] | None = None,
    stretch: Stretch | None = None,
    log: Path | None = None,
) -> FitResult:
    """Trains to the recipe's last step, from the newest whole checkpoint if there is one. Every rank calls it.

    Args:
        task: module with ``forward(batch) -> (loss, report)`` and ``parameter_groups(optim)``; gets the best weights
            at the end.
        loader: yields this rank's micro-batches for ever.
        run_dir: this run's directory, seen by all ranks.
        tracker: gets logged metrics, on rank 0.
        validate: ``(task, step) -> metrics``, called by every rank without gradient; rank 0's answer counts.
        selection: what makes a validation the best (default: lower `val/loss`).
        save_model: ``(task, directory)``, called by rank 0 with the best weights.
        stretch: what part of the run this is (None: all of it); `recipe` holds its settings. One that ends before the
            run's last step leaves a checkpoint there and the task as it was.
        log: file that takes what the run says, instead of the terminal.

    Raises:
        UserError: for a run directory of another recipe, or one with damaged checkpoints only, a profile or trace of
            no step, a loss that is not finite, a disk that is full.
        Preempted: after SIGTERM or Ctrl-C, when everything is saved.
    """
    stretch = stretch or Stretch(recipe, recipe)
    claim_run_dir(run_dir, stretch.whole, world)
    torch.manual_seed(recipe.run.seed + world.rank)  # each rank its own dropout; weights come from rank 0
    run = _Run(task, loader, stretch, run_dir, world, tracker, validate, selection or Selection(), log)
    with run.line, heeding_signals() as requests:
        run.resume()
        run.train(requests)
        return run.finish(save_model, requests)


def _refuse_beyond(total: int, **ranges: tuple[int, int] | None) -> None:
    for name, steps in ranges.items():
        if steps and steps[0] > total:
            raise UserError(
                f"begins at step {steps[0]}, and the run has {total}",
                where=f"training.{name}",
                expected="[first step, last step] of the run",
            )


class _Run:
    """A run in progress."""

    def __init__(
        self,
        task: nn.Module,
        loader: Loader,
        stretch: Stretch,
        run_dir: Path,
        world: World,
        tracker: MetricSink | None,
        validate: Validate | None,
        selection: Selection,
        log: Path | None,
    ) -> None:
        recipe, self.whole = stretch.settings, stretch.whole
        self.task, self.loader, self.recipe, self.run_dir, self.world = task, loader, recipe, run_dir, world
        self.tracker, self.validate, self.selection = tracker, validate, selection
        training, epoch = recipe.training, loader.steps_per_epoch
        self.total = training.steps or training.epochs * epoch
        self.until = min(self.total, stretch.until or self.total)
        _refuse_beyond(self.total, profile=training.profile, trace=training.trace)
        self.eval_every = training.eval_every or epoch
        self.save_every = training.save_every or epoch
        self.engine = build_engine(task, recipe, world)
        self.driver = Driver(self.engine, recipe, world, self._begin)
        self.as_one = recipe.engine.accumulation > 1 and contrasts(task)
        self.rates = LearningRates(self.engine.optimizer, self.total, recipe.optim)
        self.feed = Feed(world.device)
        self.window = Window(world)
        self.nonfinite = NonFinitePolicy(training.nonfinite_skips, training.nonfinite_rollbacks)
        self.watchdog = Watchdog(training.watchdog_s, run_dir / "hangs", world)
        self.profile = StepProfile(training.profile, run_dir / "profile" / f"rank-{world.rank:05d}.json.gz")
        self.trace = StepTrace(training.trace, run_dir, world.rank)
        self.meters = Meters(recipe.data.global_batch, world.ranks, world.device, precision=recipe.engine.precision)
        self.line = ProgressLine(recipe.run.name, self.total, enabled=world.leads, log=log)
        self.step = self.resumed_from = self.saved_step = self.best_step = 0
        self.saved_at = time.monotonic()
        self.rolled_back = False
        self.best_value: float | None = None
        self.metrics: dict[str, float] = {}
        self.file: MetricsFile | None = None
        self.store = checkpoint_store(recipe.training.checkpoint_url, recipe.run.name)
        self.uploader = Uploader(self.store, self.line.say) if self.store and world.leads else None

    # ---- start -------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Goes to the newest whole checkpoint and says which and why.

        Raises:
            UserError: when there are checkpoints and none is whole.
        """
        self.line.say(self._describe())
        checkpoint, refused = self.world.led(self._newest)
        for reason in refused:
            self.line.say(f"passed over checkpoint {reason}")
        if checkpoint:
            self._go_to(checkpoint)
            self._look_for_best()
            where = "the run is complete" if self.step >= self.total else f"going on to step {self.total}"
            self.line.say(f"resumed from {checkpoint.path}, the newest whole checkpoint; {where}")
        else:
            refuse_all_damaged(self.run_dir, self.store, refused)
            self.line.say(f"starting at step 0 of {self.total}: no checkpoint yet in {self.run_dir}")
        if self.world.leads:
            self.file = MetricsFile(self.run_dir, resume_step=self.step)

    def _describe(self) -> str:
        """Returns what is about to train, and on what, in a line."""
        engine, batch, epoch = self.recipe.engine, self.recipe.data.global_batch, self.loader.steps_per_epoch
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.task.parameters()]
        trained, whole = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
        return (
            f"{self.world.ranks} {'rank' if self.world.ranks == 1 else 'ranks'} on {self.world.device.type}, "
            f"{engine.precision}, ZeRO {self.engine.zero_optimization_stage()}; "
            f"{trained:,} of {whole:,} parameters train; "
            f"{epoch * batch} clips an epoch in {epoch} global batches of {batch}"
        )

    def _newest(self) -> tuple[Checkpoint | None, list[str]]:
        checkpoint, refused = newest_whole(self.run_dir)
        if self.store:
            local = checkpoint
            checkpoint, elsewhere = bring_newest(self.run_dir, self.store, local)
            if checkpoint is not None and checkpoint is not local:
                self.line.say(f"took checkpoint {checkpoint.path.name} from {self.store.url}")
            refused += elsewhere
        if checkpoint and self.uploader:
            self.uploader.catch_up(checkpoint.path)
        return checkpoint, refused

    def _go_to(self, checkpoint: Checkpoint) -> None:
        manifest = checkpoint.manifest
        self.loader.load_state_dict(manifest.stream)
        restore(self.engine, checkpoint, self.whole, self.world)
        self.step = self.resumed_from = self.saved_step = manifest.step
        self.best_step, self.best_value, self.metrics = manifest.best_step, manifest.best_value, manifest.metrics

    def _look_for_best(self) -> None:
        """Forgets a best checkpoint that is no longer whole, rather than fail on it at the end."""
        if self.best_step in (0, self.step):
            return
        damage = self.world.led(self._damage_of_best)
        if damage:
            self.line.say(f"forgot the best checkpoint so far, of step {self.best_step}: {damage}")
            self.best_step, self.best_value = 0, None

    def _damage_of_best(self) -> str | None:
        """Returns what is wrong with the best checkpoint, unless the store could mend it."""
        damage = damage_of(self.run_dir, self.best_step)
        if damage is None and self.uploader:
            self.uploader.catch_up(checkpoint_path(self.run_dir, self.best_step))
        if damage is None or self.store is None:
            return damage
        reason = bring(self.run_dir, self.store, self.best_step)
        if reason:
            return f"{damage}; {reason}"
        self.line.say(f"took the best checkpoint so far, of step {self.best_step}, from {self.store.url}: {damage}")
        return None

    # ---- the loop ----------------------------------------------------------------------------------------------

    def train(self, requests: Requests) -> None:
        """Steps to the stretch's end; validates, saves and logs on the way."""
        if self.step >= self.until:
            return
        batches, agreed = iter(self.loader), Flag(self.world)
        self.engine.train()
        self.meters.start()
        self._count_flops = peak_flops(self.world.device, self.recipe.engine.precision) is not None
        stopped = False
        with self.watchdog, self.profile, self.trace:
            while self.step < self.until:
                self._train_step(batches)
                self._do_what_is_due()
                self._look_at_the_clock(requests)
                asked = agreed(requests.take())
                if asked and self.step < self.total:
                    self._save()
                    requests.heeded()
                    stopped = asked == STOP
                    if stopped:
                        break
        if stopped:
            self.line.say(f"stopped at step {self.step} as asked; saved; start the run again to go on")
            self._finish_upload(requests)
            raise Preempted(requests.status)

    def _do_what_is_due(self) -> None:
        """Logs, validates and saves where this step is one of those."""
        last = self.step == self.total
        if self._logs():
            self._log()
        if self.validate and (last or self.step % self.eval_every == 0):
            self._validate()
        if self.step == self.until or self.step % self.save_every == 0 or self.rolled_back:
            self._save()

    def _look_at_the_clock(self, requests: Requests) -> None:
        """Asks for a checkpoint, of all ranks, where the last one is too long ago."""
        minutes, now = self.recipe.training.save_minutes, time.monotonic()
        if minutes and self.world.leads and now - self.saved_at >= 60 * minutes:
            self.saved_at = now  # asked once: several ranks need another step to agree
            requests.ask_to_save()

    def _begin(self, phase: Phase) -> None:
        self.watchdog.enter(phase, self.step)
        self.profile.enter(phase, self.step)
        self.trace.enter(phase, self.step)

    def _train_step(self, batches: Iterator[Any]) -> None:
        self.step += 1
        self.rate = self.rates.set(self.step)
        if self.as_one:
            self._step_as_one([self._next(batches) for _ in range(self.recipe.engine.accumulation)])
        else:
            for _ in range(self.recipe.engine.accumulation):
                batch = self._next(batches)
                loss, report = self._forward(batch)
                self.driver.backward(loss)
                self.driver.step()
                self.window.add(self.step, batch.keys, loss, report)
        self.window.end_step(self.driver.left_out)
        if self._logs():
            self._settle()  # the device has done what it was given before the clock is read
        self.meters.step()

    def _logs(self) -> bool:
        return self.step == self.total or self.step % self.recipe.training.log_every == 0

    def _next(self, batches: Iterator[Any]) -> Any:
        self.feed.keep_pace()
        self._begin("load")
        with self.meters.waiting():
            batch = next(batches)
        return self.feed.to_device(batch)

    def _step_as_one(self, batches: list[Any]) -> None:
        loss, report = step_as_one(self.driver, batches, self._forward)
        self.window.add(self.step, [key for batch in batches for key in batch.keys], loss, report)

    def _forward(self, batch: Any, **how: bool) -> Any:
        """Runs the task; once a start also counts its FLOPs, where a peak to compare them with is known."""
        if not self._count_flops:
            return self.driver(batch, **how)
        self._count_flops = False
        # Compiled code would hide its operations from the counter.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            output = self.driver(batch, **how)
        # A backward pass costs twice its forward pass.
        self.meters.flops_per_step = 3.0 * counter.get_total_flops() * self.recipe.engine.accumulation
        return output

    # ---- once in a while ---------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Reads the losses since the last look; does what the recipe says about those that are not finite."""
        bad = self.window.settle()
        if not bad:
            return
        verdict = self.nonfinite.judge(bad)
        for one in bad:
            self.line.say(f"step {one.step} was left out, its loss or gradient is not finite: clips {one.named}")
        if verdict is Verdict.ROLL_BACK:
            checkpoint, _ = self.world.from_leader(newest_whole(self.run_dir) if self.world.leads else None)
            if checkpoint is None:
                raise self.nonfinite.refusal(bad)
            roll_back(self.engine, checkpoint, self.world)
            self.rolled_back = True
            self.line.say(
                f"put weights and optimiser back to {checkpoint.path.name}; going on with the clips that come next"
            )

    def _log(self) -> None:
        self._begin("log")
        metrics = self.window.read() | self.meters.read()
        metrics["train/lr"] = self.rate
        norm = self.driver.grad_norm()
        if norm is not None:
            metrics["train/grad_norm"] = norm
        if self.nonfinite.left_out:
            metrics["train/nonfinite_steps"] = float(self.nonfinite.left_out)
        self.loader.settle(self.world.gather)
        metrics |= {f"data/{name.removeprefix('data/')}": value for name, value in self.loader.meters().items()}
        self.line.show(self.step, metrics, self.meters.eta_s(self.total - self.step))
        if self.uploader:
            metrics["checkpoint/upload_failures"] = float(self.uploader.failures)
        self._record(metrics)

    def _validate(self) -> None:
        assert self.validate is not None
        self._begin("validate")
        task = self.engine.module.task
        with self.meters.paused(), random_states_kept(), torch.no_grad(), self.engine.module.autocast():
            self._settle()
            self.engine.eval()
            with self.watchdog.beating(task):
                self.metrics = self.world.from_leader(self.validate(task, self.step))
            self.engine.train()
        value = self.selection.value(self.metrics)
        improved = self.selection.improves(value, self.best_value)
        if improved:
            self.best_step, self.best_value = self.step, value
        self.line.say(f"step {self.step}: {self.selection.metric} {value:.4f}" + (" (best so far)" if improved else ""))
        self._record(self.metrics)
        if improved:
            self._save()

    def _save(self) -> None:
        """Saves this step once, after making sure that no loss since the last look was other than finite."""
        if self.saved_step == self.step:
            return
        self._begin("save")
        with self.meters.paused():
            self._settle()
            self.loader.settle(self.world.gather)
            best = self.step == (self.best_step or self.total)
            manifest = Manifest(
                step=self.step,
                ranks=self.world.ranks,
                stage=self.engine.zero_optimization_stage(),
                recipe=recipe_digest(as_of(self.whole, self.step)),
                stream=self.loader.state_dict(),
                metrics=self.metrics,
                best_step=self.best_step,
                best_value=self.best_value,
                loss_scale=loss_scale(self.engine),
            )
            path = save_checkpoint(self.engine, self.run_dir, manifest, self.world, weights=best)
            self.line.say(f"saved {path.name}")
            if self.world.leads:
                busy = self.uploader.travelling if self.uploader else ""
                kept = prune(self.run_dir, self.recipe.training.keep, self.step, self.best_step, busy)
                if self.uploader:
                    best_name = checkpoint_path(self.run_dir, self.best_step).name if self.best_step else ""
                    self.uploader.put(path, kept, best_name)
        self.saved_step, self.rolled_back, self.saved_at = self.step, False, time.monotonic()
        self.nonfinite.saved()

    def _finish_upload(self, requests: Requests) -> None:
        """Waits for the upload, but not for long once asked to stop.

        All ranks do by turns of some seconds: no collective is as patient as a slow store.
        """
        until, over = math.inf, self.store is None
        while not over:
            if requests.take() == STOP:
                until = min(until, time.monotonic() + GRACE_S)
            over = self.world.from_leader(self.uploader.over(until) if self.uploader else None)

    def _record(self, metrics: Mapping[str, float]) -> None:
        if self.file:
            self.file.write(self.step, metrics)
        if self.tracker and self.world.leads:
            self.tracker.log_metrics(metrics, self.step)

    # ---- end ---------------------------------------------------------------------------------------------------

    def finish(self, save_model: Callable[[Any, Path], object] | None, requests: Requests) -> FitResult:
        """Gives the caller's task the best weights and lets the engine go."""
        self._finish_upload(requests)
        best, model_dir = self.best_step or self.step, self.run_dir / "model"
        if self.step < self.total:
            self.engine.destroy()
            return FitResult(self.step, self.metrics, best, self.best_value, self.resumed_from, model_dir)
        self.world.barrier()
        # A forgotten best leaves the last step's weights, which a checkpoint that was not the best has no file of.
        kept = self.world.from_leader(has_weights(self.run_dir, best) if self.world.leads else None)
        last = None if kept else self.world.from_leader(full_weights(self.engine, self.world))
        self.engine.destroy()
        self.task.load_state_dict(load_weights(self.run_dir, best) if last is None else last)
        self.task.to(self.world.device)
        if save_model and self.world.leads:
            save_model(self.task, model_dir)
        self.world.barrier()
        return FitResult(self.step, self.metrics, best, self.best_value, self.resumed_from, model_dir)
