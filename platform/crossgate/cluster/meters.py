"""The trainer's meters for Prometheus: what a run writes to `metrics.jsonl`, shown as metrics of Ray's."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "crossgate_"
"""Ray exports ``crossgate_x`` as ``ray_crossgate_x``."""
STARTED = f"{PREFIX}started_timestamp_s"
SHOWN = ("throughput", "time", "memory", "train", "data")
"""Groups of metrics that are meters; what validation found is MLflow's matter."""
_TAIL = 1 << 16


@contextmanager
def shown_to_prometheus(run_dir: Path, every_s: float = 5.0) -> Iterator[None]:
    """Shows the newest meters of a run while it goes on, under the label ``run``.

    Reads the file that the loop writes anyway, beside it: a training step never waits for this.
    """
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}

    def show(name: str, value: float) -> None:
        if name not in gauges:
            gauges[name] = Gauge(name, tag_keys=("run",))
        gauges[name].set(value, tags={"run": run_dir.name})

    def follow() -> None:
        while not ended.wait(every_s):
            for name, value in newest(run_dir).items():
                show(name, value)

    show(STARTED, time.time())
    ended = threading.Event()
    thread = threading.Thread(target=follow, name="meters", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for name, value in newest(run_dir).items():
            show(name, value)


def newest(run_dir: Path) -> dict[str, float]:
    """Returns Prometheus name -> newest value of every meter; empty while there are none."""
    found: dict[str, float] = {}
    for line in _last_lines(run_dir / "metrics.jsonl"):
        for key, value in line.items():
            group, slash, _ = key.partition("/")
            if slash and group in SHOWN and isinstance(value, int | float):
                found[metric_name(key)] = float(value)
    return found


def metric_name(key: str) -> str:
    """Returns ``throughput/clips_per_s`` as ``crossgate_throughput_clips_per_s``."""
    return PREFIX + re.sub(r"[^A-Za-z0-9]+", "_", key)


def _last_lines(path: Path) -> list[dict[str, object]]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            size = file.tell()
            file.seek(max(0, size - _TAIL))
            lines = file.read().splitlines()[0 if size <= _TAIL else 1 :]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # the loop is in the middle of it
            continue
    return found
