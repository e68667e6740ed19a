"""A rank that stands still says where and ends; one that gets on is left alone. `drill.py` hangs a whole run."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from tiny_run import TinyTask, global_batch, run_fit, tiny_recipe

from crossgate.training import watchdog
from crossgate.training.watchdog import EXIT_STUCK, Watchdog
from crossgate.training.world import World

CPU = torch.device("cpu")


class Clock:
    """The watchdog's clock, which the test puts on: a busy machine takes no time by it."""

    def __init__(self) -> None:
        self.now, self.looked = 0.0, threading.Event()

    def monotonic(self) -> float:
        now = self.now
        if threading.current_thread().name == "watchdog":
            self.looked.set()
        return now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pass_seen(self, seconds: float) -> None:
        """Lets time pass, and waits until the watchdog's thread has looked at what it is now."""
        self.now += seconds
        self.looked.clear()
        assert self.looked.wait(60)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(watchdog, "time", found)
    return found


@pytest.fixture
def ended(monkeypatch, clock):
    """How processes would have ended; the thread that would have ended one finds itself back at the beginning."""
    exits: list[int] = []
    over = threading.Event()

    def end(code: int) -> None:
        exits.append(code)
        clock.now = 0.0
        over.set()

    monkeypatch.setattr(watchdog.os, "_exit", end)
    return exits, over


def stuck_here(clock: Clock, over: threading.Event) -> None:
    clock.now += 4
    assert over.wait(60)


def test_a_stuck_rank_names_its_phase_and_shows_its_stacks(tmp_path, clock, ended, capsys):
    exits, over = ended
    (tmp_path / "rank-00001.txt").write_text("rank 1: load of step 7, for 3 s\nstacks")
    (tmp_path / "rank-00000.txt").write_text("of an earlier start")
    with Watchdog(0.2, tmp_path, World(0, 0, 3, CPU)) as dog:
        dog.enter("backward", 7)
        stuck_here(clock, over)
    assert exits == [EXIT_STUCK]
    assert (tmp_path / "rank-00000.before.txt").read_text() == "of an earlier start"
    report = (tmp_path / "rank-00000.txt").read_text()
    assert report.startswith("rank 0: backward of step 7, for 4 s\n")
    assert "Thread MainThread:" in report
    assert "in stuck_here" in report
    said = capsys.readouterr().err.splitlines()[0]
    assert "hangs" in said
    assert "rank 0: backward of step 7, for 4 s; rank 1: load of step 7, for 3 s; rank 2: silent" in said
    assert str(tmp_path) in said


def test_a_rank_that_gets_on_is_left_alone(tmp_path, clock, ended):
    task = TinyTask()
    with Watchdog(0.3, tmp_path, World(0, 0, 1, CPU)) as dog:
        for step in range(4):
            dog.enter("forward", step)
            clock.pass_seen(0.1)
        with dog.beating(task):
            for _ in range(4):  # a validation: one phase, some batches
                task.predict(global_batch(0, 4))
                clock.pass_seen(0.1)
    assert ended[0] == []
    assert not list(tmp_path.iterdir())


def test_every_phase_of_a_run_is_announced(tmp_path, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(Watchdog, "enter", lambda self, phase, step: seen.append(f"{phase} {step}"))
    recipe = tiny_recipe(tmp_path, "run", training={"steps": 2, "log_every": 2}, engine={"accumulation": 2})
    run_fit(recipe)
    micro_batch = ["load", "forward", "backward", "step"]
    assert seen == [f"{phase} 1" for phase in micro_batch * 2] + [
        f"{phase} 2" for phase in [*micro_batch * 2, "log", "validate", "save"]
    ]


FROZEN = """
import re, sys
from pathlib import Path
import torch
from crossgate.training import watchdog
from crossgate.training.world import World
watchdog._PATIENCE_S = 0.5
with watchdog.Watchdog(1.0, Path(sys.argv[1]), World(0, 0, 1, torch.device("cpu"))) as dog:
    dog.enter("load", 3)
    re.match("(a+)+b", "a" * 64)  # years, without giving the interpreter back
"""


def test_code_that_keeps_the_interpreter_is_ended_too(tmp_path):
    done = subprocess.run([sys.executable, "-c", FROZEN, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode not in (0, EXIT_STUCK)
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 10' in done.stderr
