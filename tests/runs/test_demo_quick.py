"""The demo in small, by its command: every step to the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crossgate.evaluation import read_results


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_quick_demo_reaches_its_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crossgate", "demo", "--quick", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for name in ("report.html", "preview.png", "shards/index.json"):
        assert (tmp_path / "demo" / name).exists(), name
    numbers, _ = read_results(tmp_path / "demo" / "results.json")
    assert {"action/test/accuracy", "violence/test/average_precision", "seconds/predict"} <= set(numbers)
    assert "models:/crossgate-violence@champion" in done.stdout
