"""Two starts of one run: the second one is told so and leaves everything alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crossgate.errors import UserError
from crossgate.runs import ownership
from crossgate.runs.ownership import nothing_left_of_a_refusal, only_start
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


@pytest.mark.parametrize(("trained", "kept"), [("", False), ("recipe.yaml", True)])
def test_a_refused_start_leaves_nothing_unless_the_run_had_begun(tmp_path: Path, trained: str, kept: bool) -> None:
    directory = tmp_path / "run"
    (directory / "tracking").mkdir(parents=True)
    if trained:
        (directory / trained).touch()
    with pytest.raises(UserError, match="no such encoder"), only_start(directory, current_world()):
        with nothing_left_of_a_refusal(directory, current_world()):
            raise UserError("no such encoder")
    assert directory.exists() == kept
    assert not kept or (directory / "tracking").exists()


def test_a_run_that_died_of_no_refusal_keeps_its_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), nothing_left_of_a_refusal(tmp_path, current_world()):
        raise RuntimeError("a defect, to be looked into")
    assert tmp_path.exists()
