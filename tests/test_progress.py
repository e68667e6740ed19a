"""Progress of a long job: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys

import pytest

from crossgate.progress import progress_bar


def test_a_log_gets_the_first_and_the_last_step_and_none_in_between(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("clips", every_s=3600) as step:
        for done in range(1, 6):
            step(done, 5)
        step(5, 5)  # told twice, said once
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["1/5", "5/5"]
    assert all("clips/s" in line and "ETA" in line for line in lines)
    assert lines[-1].endswith("ETA 0 s")


def test_a_log_gets_every_step_where_steps_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("shards", every_s=0) as step:
        for done in (0, 2, 4):
            step(done, 4)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["0/4", "2/4", "4/4"]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("clips") as step:
        step(1, 2)
        step(2, 2)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert "clips/s" in shown.err
    assert shown.out == ""


def test_an_error_inside_ends_the_bar_and_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def broken() -> None:
        with progress_bar("clips") as step:
            step(1, 2)
            raise KeyError("inside")

    with pytest.raises(KeyError):
        broken()
