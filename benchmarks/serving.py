"""A model's way through a registry and out again: what serving it costs over calling its network directly.

    make demo
    python benchmarks/serving.py [--run RUN --index SHARDS --videos FOLDER] [--same-environment] [--rounds 5]

An MLflow server runs over HTTP with its tables in PostgreSQL and its files in S3 (SeaweedFS), both on loopback; SQLite
and plain files stand in where they are not installed. The run's model (default: the demo's violence model) becomes
champion, its opposite is refused, its equal promoted and rolled back. A virtual environment is made of the model's own
requirements alone, loads it by alias, and serves it with `mlflow models serve`.

Videos are sent by their bytes. One at a time, the served answer and `serving_direct.py`, the same network called
directly in that environment, take turns video by video; the overhead is the median of the paired ratios, decoding
counted on both sides. At 1, 4 and 16 requests at once, bursts over all videos take turns with as many threads of the
direct caller. Everything runs on this machine, the client too. Cold load is a new process, imports and download
included.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "tests" / "registry"), str(HERE.parent / "tests")]
from free_ports import free_port  # noqa: E402
from life_cycle import NAME, live  # noqa: E402
from servers import Registry, registry, serving  # noqa: E402

LEVELS = (1, 4, 16)
LOAD = """
import time; begun = time.perf_counter()
import mlflow.pyfunc; imported = time.perf_counter()
model = mlflow.pyfunc.load_model("{uri}"); loaded = time.perf_counter()
model.predict([open("{video}", "rb").read()])
import json; print(json.dumps([imported - begun, loaded - imported, time.perf_counter() - loaded]))
"""


@dataclass
class Found:
    """What was measured: seconds and rates, a list entry a round or video."""

    load: list[float] = field(default_factory=list)
    up_s: float = 0.0
    pairs: list[tuple[float, float, float]] = field(default_factory=list)
    """Served, direct, and of the latter in the network."""
    latency: dict[int, list[float]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    rate: dict[int, list[float]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    ratio: dict[int, list[float]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    """Clips a second of the served model over those of the direct caller."""
    peak_mb: float = 0.0
    direct_mb: float = 0.0


def environment(folder: Path, requirements: Path) -> Path:
    """Returns the Python of a new environment that holds what the requirements name, and nothing else."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    return python


# ---- what is compared ------------------------------------------------------------------------------------------


class Served:
    """The model behind HTTP."""

    def __init__(self, url: str) -> None:
        self._url, self._session = f"{url}/invocations", requests.Session()
        # The server closes what was idle for five seconds, as while the direct caller is busy.
        again = Retry(total=2, allowed_methods=None)
        self._session.mount("http://", HTTPAdapter(pool_maxsize=max(LEVELS), max_retries=again))

    def score(self, body: bytes) -> tuple[float, list[dict[str, Any]]]:
        """Returns seconds and the rows of a request."""
        begun = time.perf_counter()
        answer = self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}, timeout=300)
        seconds = time.perf_counter() - begun
        answer.raise_for_status()
        rows = answer.json()["predictions"]
        assert all(row["error"] is None for row in rows), rows
        return seconds, rows

    def burst(self, bodies: list[bytes], at_once: int) -> tuple[float, list[float]]:
        """Returns the seconds for all requests, and each one's."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            latencies = [seconds for seconds, _ in pool.map(self.score, bodies)]
        return time.perf_counter() - begun, latencies


class Direct:
    """A process of `serving_direct.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.peak_mb = 0.0
        self._answer()

    def ask(self, videos: list[Path], **how: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"videos": list(map(str, videos)), **how}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak_mb = answer["peak_mb"]
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def direct_caller(python: Path, package: Path) -> Iterator[Direct]:
    command = [python, HERE / "peers" / "serving_direct.py", package / "artifacts" / "model"]
    own = {**os.environ, "PYTHONPATH": str(package / "code")}
    process = subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Direct(process)
    finally:
        process.kill()
        process.wait()


# ---- measuring -------------------------------------------------------------------------------------------------


def measure(python: Path, package: Path, server: Registry, videos: list[Path], rounds: int, log: Path) -> Found:
    """Loads, serves and compares; the answers of both sides have to be the same."""
    found, uri = Found(), f"models:/{NAME}@champion"
    own = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    begun = time.perf_counter()
    script = LOAD.format(uri=uri, video=videos[0])
    done = subprocess.run([python, "-c", script], env=own, capture_output=True, text=True, cwd=log.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    imported, loaded, predicted = json.loads(done.stdout.splitlines()[-1])
    found.load = [imported, loaded, predicted, time.perf_counter() - begun]

    port = free_port()
    words = ["models", "serve", "-m", uri, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    settings = {"SERVING_MODEL_CONFIG": json.dumps({"paths": False, "urls": False})}
    command, url = [str(python), "-m", "mlflow", *words], f"http://127.0.0.1:{port}"
    begun = time.perf_counter()
    with (
        serving(command, f"{url}/ping", log, settings | {"MLFLOW_TRACKING_URI": server.uri}) as process,
        direct_caller(python, package) as direct,
    ):
        found.up_s = time.perf_counter() - begun
        compare(found, Served(url), direct, videos, rounds)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        found.peak_mb, found.direct_mb = max(map(peak_mb, family)), direct.peak_mb
    return found


def compare(found: Found, served: Served, direct: Direct, videos: list[Path], rounds: int) -> None:
    bodies = [json.dumps({"inputs": [base64.b64encode(one.read_bytes()).decode()]}).encode() for one in videos]
    clips = 0
    for video, body in zip(videos, bodies):  # the first time round warms both up
        rows, answer = served.score(body)[1], direct.ask([video])
        first = sorted(rows[0]["scores"])
        for row, scores in zip(rows, answer["scores"], strict=True):
            assert all(abs(row["scores"][name] - score) < 1e-4 for name, score in zip(first, scores)), video
        clips += len(rows)
    for _ in range(rounds):
        for video, body in zip(videos, bodies):
            seconds, _ = served.score(body)
            answer = direct.ask([video])
            found.pairs.append((seconds, answer["decode_s"] + answer["forward_s"], answer["forward_s"]))
        for level in LEVELS:
            seconds, latencies = served.burst(bodies, level)
            found.latency[level] += latencies
            found.rate[level].append(clips / seconds)
            found.ratio[level].append(direct.ask(videos, threads=level)["seconds"] / seconds)


def peak_mb(process: psutil.Process) -> float:
    """Returns the most memory that a process has held (Linux)."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


# ---- the page --------------------------------------------------------------------------------------------------


def page(found: Found, server: Registry, told: str, said: list[str]) -> tuple[str, dict[str, float]]:
    overhead = statistics.median(served / direct for served, direct, _ in found.pairs) - 1
    beyond = statistics.median(1000 * (served - direct) for served, direct, _ in found.pairs)
    direct_ms = statistics.median(1000 * direct for _, direct, _ in found.pairs)
    network_ms = statistics.median(1000 * network for _, _, network in found.pairs)
    imported, loaded, predicted, whole = found.load
    figures = {
        "overhead_pct": round(100 * overhead, 1),
        "p50_ms": round(1000 * statistics.median(found.latency[1]), 1),
        "p95_ms": round(1000 * percentile(found.latency[1], 0.95), 1),
        "clips_per_s": round(max(statistics.median(rates) for rates in found.rate.values()), 2),
        "load_s": round(whole, 1),
        "peak_mb": round(found.peak_mb),
    }
    lines = [
        f"{datetime.date.today()}, {platform.machine()} CPU, {os.cpu_count()} cores shared with other work, "
        f"{server.database}, {server.artifacts}, {told}",
        "",
        *(f"- {line}" for line in said),
        "",
        f"One request at a time, in turns with the direct caller: {overhead:+.1%} ({beyond:+.1f} ms on "
        f"{direct_ms:.1f} ms, {network_ms:.1f} of them in the network, the rest decoding).",
        "",
        "| requests at once | p50, ms | p95, ms | clips/s | of as many direct threads' |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for level in LEVELS:
        latency = found.latency[level]
        lines.append(
            f"| {level} | {1000 * statistics.median(latency):.1f} | {1000 * percentile(latency, 0.95):.1f} | "
            f"{statistics.median(found.rate[level]):.2f} | {statistics.median(found.ratio[level]):.2f} |"
        )
    lines += [
        "",
        f"Cold load in a new process {whole:.1f} s: {imported:.1f} to import MLflow, {loaded:.1f} to fetch and load "
        f"the model, {predicted:.2f} for the first video. `mlflow models serve` answers after {found.up_s:.1f} s. Most "
        f"memory held: {found.peak_mb:.0f} MiB served, {found.direct_mb:.0f} MiB called directly.",
    ]
    return "\n".join(lines) + "\n", figures


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    demo = next(iter(sorted(Path("demo/runs").glob("finetune-finetune-violence-*"))), None)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=demo, help="a finished fine-tuning run")
    parser.add_argument("--index", default="demo/shards", help="the index whose test clips decide")
    parser.add_argument("--videos", type=Path, default=Path("demo/clips"), help="a folder of videos to score")
    parser.add_argument("--limit", type=int, default=32, help="videos at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--same-environment", action="store_true", help="no new virtual environment")
    parser.add_argument("--out", default=str(HERE / "results" / "serving.md"))
    options = parser.parse_args()
    if options.run is None:
        print("no run to serve: `make demo` makes one\n{}")
        return
    with tempfile.TemporaryDirectory() as name, registry(Path(name) / "registry") as server:
        folder = Path(name)
        said = live(options.run, folder / "others", server.uri, options.index)
        package = fetched(server, folder / "package")
        python = Path(sys.executable)
        if not options.same_environment:
            python = environment(folder / "venv", package / "requirements.txt")
        videos = sorted(options.videos.absolute().rglob("*.mp4"))  # read from other folders too
        videos = videos[:: max(1, len(videos) // options.limit)][: options.limit]
        found = measure(python, package, server, videos, options.rounds, folder / "serve.log")
        own = "this environment" if options.same_environment else "an environment of the model's requirements alone"
        told = f"{own}, {len(videos)} videos of {options.videos.name}, {options.rounds} rounds, one thread an operation"
        table, figures = page(found, server, told, said)
    Path(options.out).write_text(table)
    print(table)
    print(json.dumps(figures))


def fetched(server: Registry, folder: Path) -> Path:
    """Returns the champion's package, as the registry hands it out."""
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    source = MlflowClient(server.uri, server.uri).get_model_version_download_uri(NAME, "1")
    return Path(shutil.move(download_artifacts(source, tracking_uri=server.uri), folder))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
