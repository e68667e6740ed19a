"""Packing over a Ray cluster: a task a unit, the same bytes as `runs.pack` writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from crossgate.cluster.paths import read, written
from crossgate.cluster.session import ray_session
from crossgate.config import ClusterConfig
from crossgate.errors import UserError
from crossgate.runs import pack as here
from crossgate.runs.pack import PackSettings, Progress, Unit, UnitReport, died, pack_unit
from crossgate.stream.index import Index
from crossgate.stream.storage import Store


def pack(
    manifest: str | Path,
    out_url: str,
    settings: PackSettings | None = None,
    progress: Progress | None = None,
    cluster: ClusterConfig | None = None,
) -> Index:
    """Packs the videos of a manifest, a unit a CPU of the cluster; called again after a kill it continues.

    All machines must see the videos and the folder for the shards under the same names.

    Args:
        manifest, out_url, settings, progress: as `runs.pack.pack`; progress comes a unit at a time, and the cluster
            decides how many processes there are.
        cluster: whose `address` is used (None: the running cluster, else a private one).

    Raises:
        UserError: as `runs.pack.pack`, or when the cluster cannot be reached.
    """

    def spread(
        store: Store, units: Sequence[Unit], settings: PackSettings, step: Callable[[int], None]
    ) -> dict[str, UnitReport]:
        with ray_session(cluster or ClusterConfig(), cpus=1) as ray:
            return _as_tasks(ray, store, units, settings, step)

    return here.pack(read(str(manifest)), written(out_url), settings, progress, spread)


def _as_tasks(
    ray: Any, store: Store, units: Sequence[Unit], settings: PackSettings, step: Callable[[int], None]
) -> dict[str, UnitReport]:
    task = ray.remote(num_cpus=1)(pack_unit)
    left = iter(units)
    running: dict[Any, Unit] = {}
    reports: dict[str, UnitReport] = {}
    count = 0
    try:
        while len(reports) < len(units):
            # More than there is room for, so that a cluster that can grow sees a reason to.
            room = 2 * int(ray.cluster_resources().get("CPU", 1)) - len(running)
            running |= {task.remote(store, unit, settings): unit for unit in islice(left, room)}
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            unit = running.pop(ready)
            reports[unit.name] = ray.get(ready)
            count += len(unit.rows)
            step(count)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise died(store) from None
    finally:
        if running:  # waited for, not cancelled: Ray (2.60) aborts where a task ends just as it is being cancelled
            ray.wait(list(running), num_returns=len(running))
    return reports
