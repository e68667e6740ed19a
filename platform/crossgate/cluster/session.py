"""A connection to Ray: the running cluster if there is one, else a private one for as long as it is needed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crossgate
from crossgate import environment
from crossgate.cluster.room import Need, Share, wait_for_room
from crossgate.config import ClusterConfig
from crossgate.errors import UserError, first_line

LOCAL = "local"
_PRIVATE = "crossgate_private"
"""Resource that marks a cluster as started for a run on one machine."""


@contextmanager
def ray_session(config: ClusterConfig, cpus: float, need: Need | None = None) -> Iterator[Any]:
    """Gives the `ray` module, connected; disconnects at the end, unless it was connected before.

    Args:
        config: `address` may be ``local`` for a private cluster in any case.
        cpus: CPUs that are of use at once; a private cluster gets them whatever the machine has.
        need: what the cluster must have room for.

    Raises:
        UserError: when the cluster cannot be reached, or is and stays too small.
    """
    environment.calm_ray()
    import ray

    if ray.is_initialized():
        _check_room(ray, config, need)
        yield ray
        return
    _connect(ray, config, cpus)
    try:
        _check_room(ray, config, need)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, config: ClusterConfig, cpus: float) -> None:
    root = Path(crossgate.__file__).parents[1]
    runtime: dict[str, Any] = {
        "env_vars": environment.worker_environment(root),
        "worker_process_setup_hook": prepare_worker,
    }
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "configure_logging": True}
    named = config.address or environment.ray_address()
    if named != LOCAL:
        try:
            # The package travels along, so that other machines run this very code.
            shipped = runtime | {"py_modules": [str(root / "crossgate")]}
            ray.init(address=named or "auto", runtime_env=shipped, **quiet)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            if named:
                raise UserError(
                    f"no Ray cluster answers ({first_line(error)})",
                    where=named,
                    cure="start it, or set cluster.address=local for one of this machine's own",
                ) from None
    environment.expect_no_preemption()
    seats = max(math.ceil(cpus), environment.usable_cores())
    ray.init(
        address=LOCAL,
        num_cpus=seats,
        resources={_PRIVATE: 1},
        include_dashboard=False,
        runtime_env=runtime,
        **quiet,
    )


def workers_need(config: ClusterConfig, workers: int) -> Need:
    """Returns what so many workers need."""
    shares = ((config.cpus_per_worker, config.gpus_per_worker),) * workers
    return Need(
        f"a run of {workers} worker{'s' * (workers > 1)}", shares, "cluster.workers, cpus_per_worker, gpus_per_worker"
    )


def use_reserved(cpus: float, gpus: float) -> None:
    """Keeps this process to what Ray reserved for it.

    Ranks that share cores and each take all of them (as an inherited OMP_NUM_THREADS may say) wait for one another:
    several times slower. And a process without a reserved GPU still sees the machine's.
    """
    if not gpus:
        environment.hide_gpus()
    import torch

    torch.set_num_threads(max(1, int(cpus)))


def prepare_worker() -> None:
    """Runs first in every process of Ray's: importing this module has imported crossgate, before anything does timm."""
    # Without a dashboard this one repeats twice a second that it cannot ask it.
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def _check_room(ray: Any, config: ClusterConfig, need: Need | None) -> None:
    if need is None:
        return
    from ray.autoscaler.sdk import request_resources

    def nodes() -> list[Share]:
        had = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [(one.get("CPU", 0.0), one.get("GPU", 0.0)) for one in had]

    def ask(shares: Sequence[Share]) -> None:
        request_resources(bundles=[{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus} for cpus, gpus in shares])

    patience_s = 0.0 if _PRIVATE in ray.cluster_resources() else config.wait_s
    wait_for_room(need, nodes, patience_s, ask)
