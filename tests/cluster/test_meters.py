"""The trainer's meters as Prometheus would scrape them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from free_ports import free_port

from crossgate.cluster.meters import metric_name, newest


def write(run: Path, *lines: str) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("\n".join(lines))


def test_the_newest_value_of_every_meter(tmp_path: Path) -> None:
    write(
        tmp_path / "run",
        json.dumps({"step": 1, "time": 0.1, "throughput/clips_per_s": 10.0, "data/bad_clips": 0.0}),
        json.dumps({"step": 2, "val/accuracy": 0.5, "throughput/mfu_pct": None}),
        json.dumps({"step": 3, "throughput/clips_per_s": 12.5, "time/data_wait_pct": 3.0}),
        '{"step": 4, "throughput/clips_per_s": 9',
    )
    assert newest(tmp_path / "run") == {
        "crossgate_throughput_clips_per_s": 12.5,
        "crossgate_data_bad_clips": 0.0,
        "crossgate_time_data_wait_pct": 3.0,
    }


def test_a_run_without_meters_shows_none(tmp_path: Path) -> None:
    assert newest(tmp_path) == {}
    write(tmp_path / "run", "")
    assert newest(tmp_path / "run") == {}


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"step": n, "train/loss": float(n), "note": 200 * "x"}) for n in range(2000)]
    lines[0] = json.dumps({"step": 0, "train/only_at_first": 1.0})
    write(tmp_path / "run", *lines)
    assert newest(tmp_path / "run") == {"crossgate_train_loss": 1999.0}


def test_names_are_prometheus_names() -> None:
    assert metric_name("val/retrieval/r@1") == "crossgate_val_retrieval_r_1"


SCRAPED = """
import sys, time, urllib.request
from pathlib import Path
import ray
from crossgate import environment
environment.calm_ray()
run, port = Path(sys.argv[1]), int(sys.argv[2])
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port,
         _system_config={"metrics_report_interval_ms": 500})
@ray.remote
def work():
    from crossgate.cluster.meters import shown_to_prometheus
    with shown_to_prometheus(run, every_s=0.2):
        until, text = time.monotonic() + 60, ""
        while "ray_crossgate_throughput_clips_per_s{" not in text and time.monotonic() < until:
            time.sleep(0.5)
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                pass
    return [line for line in text.splitlines() if line.startswith(("ray_crossgate", "ray_node"))]
print("\\n".join(ray.get(work.remote())))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_exports_them_under_the_runs_name(tmp_path: Path) -> None:
    write(tmp_path / "demo", json.dumps({"step": 1, "throughput/clips_per_s": 12.5}) + "\n")
    port = free_port()
    command = [sys.executable, "-c", SCRAPED, str(tmp_path / "demo"), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    values = {line.partition("{")[0]: line for line in done.stdout.splitlines()}
    line = values["ray_crossgate_throughput_clips_per_s"]
    assert 'run="demo"' in line and line.endswith(" 12.5")
    # What the dashboard of k8s/components/monitoring draws besides.
    assert {"ray_crossgate_started_timestamp_s", "ray_node_mem_used", "ray_node_mem_total"} <= values.keys()
    assert "ray_node_disk_free" in values
