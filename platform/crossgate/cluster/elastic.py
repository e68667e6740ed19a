"""Workers that may come and go on Ray: how many of them, told before they go, saved before they change."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from crossgate.config import Recipe
from crossgate.training.requests import REQUESTS

SAVING_S = 120.0
"""Patience with a run that saves before its workers change."""


def possible_workers(recipe: Recipe) -> tuple[int, ...]:
    """Returns the numbers of workers, ascending, within the recipe's bounds that share its global batch evenly."""
    cluster, share = recipe.cluster, recipe.data.global_batch // recipe.engine.accumulation
    return tuple(n for n in range(cluster.fewest_workers, cluster.workers + 1) if share % n == 0)


class Trainer(TorchTrainer):
    """Ray's trainer with a number of workers that the recipe allows at any time, which save before they stop.

    Args:
        recipe: of the run.
        ask_to_stop: called with the signal by which the driver is told to end.
    """

    def __init__(self, *given: Any, recipe: Recipe, ask_to_stop: Callable[[int], None], **options: Any) -> None:
        super().__init__(*given, **options)
        self._counts, self._ask_to_stop = possible_workers(recipe), ask_to_stop

    def fit(self) -> Any:
        """Trains; the process's signal handlers are afterwards what they were."""
        if threading.current_thread() is not threading.main_thread():
            return super().fit()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return super().fit()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _register_sigint_handler(self, controller: Any) -> None:
        """A first Ctrl-C or SIGTERM lets the ranks save; a second one is Ray's, which ends them at once."""
        super()._register_sigint_handler(controller)
        abort = signal.getsignal(signal.SIGINT)

        def stop(number: int, _: object) -> None:
            self._ask_to_stop(number)
            signal.signal(number, abort)

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        scaling: Any = self.scaling_config
        if scaling.elasticity_enabled:
            options["scaling_policy"] = EvenScaling(scaling, self._counts)
        return super()._initialize_and_run_controller(**options)


class EvenScaling(ElasticScalingPolicy):
    """Ray's elastic policy for numbers of workers that share the global batch evenly; it lets the run save first.

    Args:
        scaling_config: with a pair of bounds.
        counts: numbers of workers that are possible, ascending.
    """

    def __init__(self, scaling_config: ScalingConfig, counts: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._counts = counts
        self._saving_until: float | None = None

    def _get_reserved_resources(self) -> Any:
        reserved = super()._get_reserved_resources()
        if reserved is None:
            return None
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # what was reserved may have died since
        return {node: resources for node, resources in reserved.items() if node in alive}

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= room), default=0)

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._saving_until = None  # whatever was to be saved first is gone
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        workers, saving_until = worker_group_state.workers, self._saving_until
        if saving_until is not None:
            if time.monotonic() < saving_until and not _all(workers, _has_saved):
                return NoopDecision()
            # The room may have gone while they saved: Ray looks anew, though it did so less than an interval ago.
            self._saving_until, self._latest_monitor_time = None, float("-inf")
        decision: Any = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if saving_until is None and isinstance(decision, ResizeDecision):
            _all(workers, _ask_to_save)
            self._saving_until = time.monotonic() + SAVING_S
            return NoopDecision()
        return decision


def _all(workers: list[Any], question: Any) -> bool:
    """Asks every worker's process; a dead or busy one counts as a no."""
    try:
        return all(ray.get([worker.execute_async(question) for worker in workers], timeout=5))
    except (ray.exceptions.RayError, TimeoutError):
        return False


def _ask_to_save() -> bool:
    REQUESTS.ask_to_save()
    return True


def _has_saved() -> bool:
    return REQUESTS.saved()


# ---- in the workers --------------------------------------------------------------------------------------------


class HeedfulTorchConfig(TorchConfig):
    """Ray's setup of torch, with workers that save before they obey SIGTERM."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _HeedfulBackend


class _HeedfulBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_heed_sigterm)


def _heed_sigterm() -> None:
    """Runs in the worker's main thread, which alone may set handlers; training runs in another."""
    REQUESTS.begin()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: REQUESTS.ask_to_stop())


def watch_for_preemption(every_s: float = 0.5) -> None:
    """Asks the run to save once when Ray says that a node of this run will be taken away; returns at once."""
    noticed = getattr(get_train_context(), "preemption_context", None)  # later than some versions of Ray
    if noticed is not None:
        _when(lambda: noticed.preemption_info is not None, REQUESTS.ask_to_save, every_s)


def watch_for_stop(asked: Callable[[], int], every_s: float = 0.5) -> None:
    """Asks the run to save and stop once the driver is told to, by the signal that is then asked for."""
    _when(lambda: asked() > 0, lambda: REQUESTS.ask_to_stop(asked()), every_s)


def _when(so: Callable[[], bool], then: Callable[[], None], every_s: float) -> None:
    def watch() -> None:
        while not so():
            time.sleep(every_s)
        then()

    threading.Thread(target=watch, name="watch-requests", daemon=True).start()
