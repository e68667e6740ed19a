"""The load of the machine goes the way of all metrics, under the names that MLflow knows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.system_metrics.metrics import gpu_monitor

from crossgate.recipe import parse_recipe
from crossgate.tracking import open_tracker
from crossgate.tracking.system import Sampler

ALWAYS = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
    "system/disk_usage_percentage",
    "system/disk_usage_megabytes",
    "system/disk_available_megabytes",
}
NETWORK = {"system/network_receive_megabytes", "system/network_transmit_megabytes"}


class Often(Sampler):
    """Of its own interval: trackers that other tests left behind measure on at theirs."""

    interval_s = 0.05


def sampled(samples: int) -> list[tuple[int, dict[str, float]]]:
    """Returns so many samples of this machine, by their numbers."""
    found: list[tuple[int, dict[str, float]]] = []
    sampler = Often(lambda metrics, step: found.append((step, dict(metrics))), first=3)
    sampler.start()
    until = time.monotonic() + 120
    while len(found) < samples and time.monotonic() < until:
        time.sleep(0.01)
    sampler.close()
    told = len(found)
    time.sleep(0.2)
    assert len(found) == told, "it is at rest after its end"
    return found[:samples]


def test_the_machine_is_measured_under_mlflows_names() -> None:
    found = sampled(3)
    assert [step for step, _ in found] == [3, 4, 5]
    metrics = found[-1][1]
    assert set(metrics) >= ALWAYS | NETWORK
    assert metrics["system/system_memory_usage_megabytes"] <= psutil.virtual_memory().total / 1e6
    assert all(0 <= value <= 100 for name, value in metrics.items() if name.endswith("_percentage"))


def test_a_busy_cpu_is_told_from_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.0, 40.0])  # the first look of a thread has nothing to compare with
    monkeypatch.setattr(psutil, "cpu_percent", lambda: next(looks, 40.0))
    assert sampled(1)[0][1]["system/cpu_utilization_percentage"] == 40.0


def test_what_a_machine_hides_costs_no_other_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)  # a container without a network

    def denied(path: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(psutil, "disk_usage", denied)
    names = set(sampled(1)[0][1])
    assert "system/cpu_utilization_percentage" in names
    assert not [name for name in names if "disk" in name or "network" in name]


def test_each_gpu_of_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """NVIDIA's package stands in for two cards, of which one, a slice, does not tell its load."""

    class NVMLError(Exception):
        pass

    def load(card: int) -> SimpleNamespace:
        if card:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=75)

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda card: card,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetUtilizationRates=load,
        nvmlDeviceGetPowerUsage=lambda card: 350_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda card: 700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    metrics = sampled(1)[0][1]
    assert metrics["system/gpu_0_utilization_percentage"] == 75
    for card in (0, 1):
        assert metrics[f"system/gpu_{card}_memory_usage_megabytes"] == 20e3
        assert metrics[f"system/gpu_{card}_memory_usage_percentage"] == 25
        assert metrics[f"system/gpu_{card}_power_usage_watts"] == 350
    assert "Not Supported" not in caplog.text


def test_a_run_keeps_the_load_of_its_machine_and_a_resumed_one_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts: list[int] = []

    class Seen(Often):
        def __init__(self, note: Callable[[Mapping[str, float], int], None], first: int) -> None:
            firsts.append(first)
            super().__init__(note, first)

    monkeypatch.setattr("crossgate.tracking.tracker.Sampler", Seen)
    name, recipe = "system/cpu_utilization_percentage", parse_recipe({"kind": "pretrain"})
    steps: list[int] = []
    for start in (1, 2):
        with open_tracker(recipe, tmp_path / "run") as tracker:
            assert firsts[-1] == len(steps)
            _until_sampled(tmp_path / "run", len(steps) + 3)
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        steps = [m.step for m in MlflowClient(uri, uri).get_metric_history(tracker.run_id, name)]
        assert steps == list(range(len(steps))) and len(steps) >= 3 * start


def test_only_rank_0_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(Sampler, "start", lambda self: started.append(self))
    monkeypatch.setattr(Sampler, "close", lambda self: None)
    for rank in (0, 1):
        with open_tracker(parse_recipe({"kind": "pretrain"}), tmp_path / "run", rank):
            pass
    assert len(started) == 1


def _until_sampled(run_dir: Path, samples: int) -> None:
    journal, until = run_dir / "tracking" / "spool.jsonl", time.monotonic() + 120
    while journal.read_text().count("system/cpu_util") < samples and time.monotonic() < until:
        time.sleep(0.02)
