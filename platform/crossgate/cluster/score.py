"""Scoring over a Ray cluster: a task a unit, the same parts as `runs.score` writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crossgate.cluster.paths import read, tracking_address, written
from crossgate.cluster.session import ray_session, use_reserved, workers_need
from crossgate.cluster.tasks import done_by_tasks
from crossgate.config import ClusterConfig, TrackingConfig
from crossgate.errors import UserError
from crossgate.runs import score as here
from crossgate.runs.score import REGISTERED, Progress, Scored, ScorePlan, score_unit
from crossgate.stream.storage import Store
from crossgate.tracking import tracking_uri as default_server


def score(
    model: str,
    source: str,
    out: str,
    *,
    unit: int = here.UNIT,
    tracking_uri: str = "",
    bounds: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    cluster: ClusterConfig | None = None,
) -> Scored:
    """Scores all videos below a folder or prefix, a unit a worker; called again after a kill it continues.

    All machines must see the videos, the model and the folder for the table under the same names.

    Args:
        model, source, out, unit, tracking_uri, bounds, progress: as `runs.score.score`.
        cluster: `address`, and the CPUs and GPUs that Ray reserves for one worker (None: the running cluster, else a
            private one).

    Raises:
        UserError: as `runs.score.score`, or when the cluster cannot be reached.
    """
    config = cluster or ClusterConfig()

    def spread(store: Store, plan: ScorePlan, units: Sequence[int], step: Callable[[int], None]) -> None:
        with ray_session(config, config.cpus_per_worker, workers_need(config, 1)) as ray:
            _as_tasks(ray, config, store, plan, units, step)

    paths, server = _paths(model, source, out), _server(model, tracking_uri)
    return here.score(*paths, unit=unit, tracking_uri=server, bounds=bounds, progress=progress, spread=spread)


def score_here(
    model: str,
    source: str,
    out: str,
    *,
    unit: int,
    tracking_uri: str = "",
    bounds: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Does the same in this process, without Ray."""
    paths, server = _paths(model, source, out), _server(model, tracking_uri)
    return here.score(*paths, unit=unit, tracking_uri=server, bounds=bounds, progress=progress)


def _paths(model: str, source: str, out: str) -> tuple[str, str, str]:
    """Returns what means the same at every start, wherever Ray starts it."""
    return model if model.startswith(REGISTERED) else read(model), read(source), written(out)


def _server(model: str, given: str) -> str:
    """Returns the whole address of a registered model's server: a worker would guess another one."""
    if not model.startswith(REGISTERED):
        return ""
    return default_server(TrackingConfig(uri=tracking_address(given)), written("runs"))


def _as_tasks(
    ray: Any,
    config: ClusterConfig,
    store: Store,
    plan: ScorePlan,
    units: Sequence[int],
    step: Callable[[int], None],
) -> None:
    task = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker)(_score_unit)
    shared = ray.put(plan)  # its list of names may be long
    lost = UserError("a worker died", where=store.url, cure="start again: finished parts are kept")
    done = 0
    for _, videos in done_by_tasks(
        ray, units, lambda number: task.remote(config, store, shared, number), config.cpus_per_worker, lost
    ):
        done += videos
        step(done)


def _score_unit(config: ClusterConfig, store: Store, plan: ScorePlan, number: int) -> int:
    use_reserved(config.cpus_per_worker, config.gpus_per_worker)
    return score_unit(store, plan, number)
