"""How busy the machine is, under the names that MLflow shows as system metrics.

MLflow's own monitor sends from its thread, straight to the server, and ends at the first call that fails. Here MLflow
only measures; the numbers go the way of all others, through the journal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

log = logging.getLogger("crossgate.tracking")

PREFIX = "system/"
"""MLflow's interface keeps metrics of this prefix on a tab of their own."""


class Sampler:
    """Measures this process's machine at even times, from a thread of its own.

    Args:
        note: gets a sample's metrics and its number.
        first: number of the first sample, which is taken one interval after the start.
    """

    interval_s = 10.0

    def __init__(self, note: Callable[[Mapping[str, float], int], None], first: int) -> None:
        self._note, self._next = note, first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="crossgate-system", daemon=True)

    def start(self) -> None:
        """Begins to measure."""
        self._thread.start()

    def close(self) -> None:
        """Ends it, waiting at most a second: a driver that hangs holds up no run's end."""
        self._ended.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        monitors = list(_monitors())
        _measured(monitors)  # the load of a CPU is its mean since the look before
        while not self._ended.wait(self.interval_s):
            metrics = _measured(monitors)
            if metrics and not self._ended.is_set():
                self._note(metrics, self._next)
                self._next += 1


def _monitors() -> Iterator[BaseMetricsMonitor]:
    """Yields what can be measured here; GPUs need the package of their maker, `nvidia-ml-py` or `pyrsmi`."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    # It would warn anew at each sample of what a GPU does not tell, such as the load of a slice of one.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
        try:
            yield kind()
        except Exception as error:  # no such device, no package for it, or a container that hides it
            log.debug("no system metrics from %s: %s", kind.__name__, error)


def _measured(monitors: Sequence[BaseMetricsMonitor]) -> dict[str, float]:
    found: dict[str, float] = {}
    for monitor in monitors:
        try:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
        except Exception as error:  # costs the numbers of this device, and no others
            log.debug("no system metrics from %s this time: %s", type(monitor).__name__, error)
        monitor.clear_metrics()
    return {PREFIX + name: value for name, value in found.items()}
