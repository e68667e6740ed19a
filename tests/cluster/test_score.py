"""Batch scoring over Ray: `jobs/predict.py` killed half-way and started again leaves every video once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from families import kill_family
from pandas.testing import assert_frame_equal
from tiny_road import tiny_classifier

from crossgate.cluster.score import score, score_here
from crossgate.errors import UserError

JOB = Path(__file__).resolve().parents[2] / "jobs" / "predict.py"
VIDEOS, MANY = 12, 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("scored") / "model", seconds=1.0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket")
    for number in range(VIDEOS):
        texture = np.random.default_rng(number).integers(0, 255, (48, 48, 3), np.uint8)
        with av.open(str(folder / f"clip{number:02d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 48
            stream.pix_fmt = "yuv420p"
            for shift in range(8):
                frame = av.VideoFrame.from_ndarray(np.roll(texture, 2 * shift, 1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return folder


def table(out: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted(out.glob("part-*.parquet"))], ignore_index=True)


def write_plan(out: Path, videos: Path, units: list[list[str]]) -> None:
    """The plan of a start that came no further."""
    plan = {"model": "models:/any/1", "digest": "", "tracking_uri": "", "source": str(videos)}
    out.mkdir(exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan | {"units": units}))


@pytest.mark.ray
def test_the_cluster_writes_what_one_process_writes(model, videos, tmp_path, ray_cluster):
    steps: list[tuple[int, int]] = []
    spread = score(str(model), str(videos), str(tmp_path / "ray"), unit=3, progress=lambda *step: steps.append(step))
    here = score_here(str(model), str(videos), str(tmp_path / "here"), unit=3)
    assert replace(spread, digest="") == replace(here, digest="") and spread.videos == spread.rows == VIDEOS
    assert steps[0] == (0, VIDEOS) and steps[-1] == (VIDEOS, VIDEOS)
    # Kernels round by where memory lies, which no two processes share.
    assert_frame_equal(table(tmp_path / "ray"), table(tmp_path / "here"), check_exact=False, rtol=0, atol=1e-5)


@pytest.mark.ray
def test_a_user_error_of_a_worker_is_the_jobs(model, videos, tmp_path, ray_cluster):
    write_plan(tmp_path, videos, [["clip00.mp4"], ["clip01.mp4"]])
    with pytest.raises(UserError, match="127.0.0.1:9"):  # an alias is not asked for again
        score("models:/any@alias", str(videos), str(tmp_path), tracking_uri="http://127.0.0.1:9")


@pytest.mark.ray
def test_workers_ask_the_drivers_tracking_server(videos, tmp_path, ray_cluster, monkeypatch):
    """The cluster was there before: its workers have neither the driver's environment nor its working folder."""
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path / "out", videos, [["clip00.mp4"]])
    with pytest.raises(UserError, match="not in the registry"):
        score("models:/any@alias", str(videos), str(tmp_path / "out"))
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="127.0.0.1:9"):
        score("models:/any@alias", str(videos), str(tmp_path / "out"))


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_job_is_submitted_again_and_every_video_is_there_once(model, videos, tmp_path):
    out, many = tmp_path / "out", tmp_path / "many"
    many.mkdir()
    for number in range(MANY):  # seconds of work, of which the look for the third part may miss some
        shutil.copyfile(videos / f"clip{number % VIDEOS:02d}.mp4", many / f"clip{number:03d}.mp4")
    command = [sys.executable, JOB, model, many, "--out", out, "--unit", "1"]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    while first.poll() is None and len(list(out.glob("part-*.json"))) < 3:
        time.sleep(0.02)
    assert first.poll() is None, (tmp_path / "log").read_text()[-2000:]
    kill_family(first.pid)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.json")}
    assert 3 <= len(kept) < MANY and not (out / "scores.json").exists()

    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{MANY} rows of {MANY} videos" in done.stdout and f"scored by {model}" in done.stdout
    rows = table(out)
    assert sorted(rows["source"]) == sorted(map(str, many.glob("*.mp4")))
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept  # what was whole was not made again
