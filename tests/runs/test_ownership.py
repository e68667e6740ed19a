"""Two starts of one run: the second one is told so and leaves everything alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crossgate.errors import UserError
from crossgate.runs import ownership
from crossgate.runs.ownership import only_start
from crossgate.training.world import current_world

HOLD = """
import sys, time
from pathlib import Path
from crossgate.runs.ownership import only_start
from crossgate.training.world import current_world
with only_start(Path(sys.argv[1]), current_world()):
    print("mine", flush=True)
    time.sleep(120)
"""


def test_a_second_start_is_refused_until_the_first_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
        with pytest.raises(UserError, match=rf"going on already \(on .*, process {first.pid}, since 20"):
            with only_start(tmp_path, current_world()):
                pass
    finally:
        first.kill()  # as the kernel does it when memory runs out: nothing is said goodbye to
        first.wait()
    with only_start(tmp_path, current_world()):
        pass
    with only_start(tmp_path, current_world()):
        pass
