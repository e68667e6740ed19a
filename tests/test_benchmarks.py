"""Every benchmark runs without outside files, as `make bench` calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_storage_measures_every_modality_on_generated_clips(tmp_path: Path) -> None:
    out = tmp_path / "storage.md"
    command = [sys.executable, ROOT / "benchmarks" / "storage.py", "--clips", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    table = out.read_text()
    assert "generated clips" in table.splitlines()[0]
    for name in ("rgb", "flow", "audio", "depth"):
        assert f"### {name} (2 clips)" in table


@pytest.mark.slow
def test_schedule_scale_ends_with_its_figures(tmp_path: Path) -> None:
    small = ["--shards", "500", "--clips", "100", "--ranks", "16", "--workers", "2", "--out", tmp_path / "scale.md"]
    command = [sys.executable, ROOT / "benchmarks" / "schedule_scale.py", *small]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures.keys() == {"startup_s", "rss_mb", "us_per_clip", "resume_s", "reread_pct"}
    assert "clips read by two ranks (16 ranks, 50 steps) | 0 |" in (tmp_path / "scale.md").read_text()


@pytest.mark.slow
def test_contrastive_memory_measures_every_loss(tmp_path: Path) -> None:
    out = tmp_path / "memory.md"
    options = ["--batch", "512", "--dim", "64", "--tile", "128", "--repeats", "1", "--out", out]
    command = [sys.executable, ROOT / "benchmarks" / "contrastive_memory.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [line for line in out.read_text().splitlines() if line.startswith("| 512")]
    assert [row.split("|")[2].strip() for row in rows][:3] == ["tiles", "full", "full, shared"]
    assert done.stdout.splitlines()[-1] == "{}"  # nothing was judged: no batch of 16,384


@pytest.mark.slow
def test_trainer_is_compared_with_a_bare_loop(tmp_path: Path) -> None:
    small = ["--steps", "4", "--rounds", "1", "--width", "64", "--batch", "4", "--out", str(tmp_path / "trainer.md")]
    command = [sys.executable, str(ROOT / "benchmarks" / "trainer.py"), *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    ratios = {f"clips_ratio_{ranks}{against}" for ranks in (1, 2) for against in ("", "_fused")}
    assert figures.keys() == ratios | {"upload_bump_pct", "start_s"}
    assert (tmp_path / "trainer.md").read_text().count("| fit |") == 2


@pytest.mark.slow
def test_pretext_tasks_are_compared_alone_and_mixed(tmp_path: Path) -> None:
    small = ["--clips", "24", "--steps", "1", "--batch", "4", "--seeds", "2", "--head-steps", "2"]
    command = [sys.executable, str(ROOT / "benchmarks" / "pretext.py"), *small, "--out", str(tmp_path / "pretext.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"contrast", "synchrony", "all tasks, gate", "contrast and all tasks, gate"} <= figures.keys()
    assert len(figures["all tasks, gate over all tasks, random gate"]) == 3  # points, interval by seeds
    page = (tmp_path / "pretext.md").read_text()
    assert "| rotation | 6.2 |" in page and "| all tasks, gate - all tasks, equal weights |" in page
    assert "2 seeds of pretraining" in page and " of 2 |" in page


@pytest.mark.slow
@pytest.mark.s3
def test_loader_is_compared_with_webdataset(tmp_path: Path) -> None:
    small = ["--clips", "4", "--copies", "8", "--rounds", "1", "--out", str(tmp_path / "loader.md")]
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"local_vs_best", "s3_vs_best", "exactness_cost_pct", "resume_vs_start", "webdataset"} <= figures.keys()
    assert "| local disk | crossgate |" in (tmp_path / "loader.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_study_ends_with_its_page(tmp_path: Path) -> None:
    made = ROOT / "demo"
    demo = ["--demo", made] if (made / "results.json").exists() else []  # CI has just made it
    command = [sys.executable, ROOT / "benchmarks" / "study.py", "--short", "--out", tmp_path / "study", *demo]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert len(figures["Chosen fusions by pretraining"]) == 3
    assert [name for name, value in figures.items() if isinstance(value, float)] == [
        "averaging, from scratch", "averaging, pretrained", "sigmoid gate and MMTM, pretrained",
    ]  # fmt: skip
    page = (tmp_path / "study" / "study.md").read_text()
    for part in (
        "none spoiled: action",
        "spoiled: violence",
        "truth of degradation",
        "| uniform mean | ",
        "| the fusion that validation chose for each | | ",
        "Trained end to end",
        "| 1 % | ",
        "synchrony",
    ):
        assert part in page, part
