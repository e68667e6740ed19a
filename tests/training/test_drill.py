"""The fault drill as far as it needs no server; `drill.py` says what it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_drill_ends_as_if_nothing_had_happened() -> None:
    command = [sys.executable, str(Path(__file__).with_name("drill.py")), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"drills": 10, "passed": 10}
