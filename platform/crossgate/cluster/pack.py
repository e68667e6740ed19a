"""Packing over a Ray cluster: a task a unit, the same bytes as `runs.pack` writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossgate.cluster.paths import read, written
from crossgate.cluster.session import ray_session
from crossgate.cluster.tasks import done_by_tasks
from crossgate.config import ClusterConfig
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
    reports: dict[str, UnitReport] = {}
    count = 0
    for unit, report in done_by_tasks(ray, units, lambda unit: task.remote(store, unit, settings), 1, died(store)):
        reports[unit.name] = report
        count += len(unit.rows)
        step(count)
    return reports
