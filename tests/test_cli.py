"""The command line: help, one-line errors, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossgate.cli import main

COMMANDS = [
    "pack",
    "check",
    "preview",
    "synth",
    "pretrain",
    "finetune",
    "evaluate",
    "search",
    "release",
    "predict",
    "doctor",
    "demo",
    "explain",
]


def crossgate(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crossgate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    from typer.testing import CliRunner

    from crossgate.cli import app

    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_help_is_quick_to_import() -> None:
    code = "import sys, crossgate.cli; assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_misspelt_run_is_said_before_models_are_imported() -> None:
    code = (
        "import sys; from crossgate.cli import main; sys.argv[1:] = ['release', 'nowhere']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'mlflow'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["pretrain", "-c", "nowhere.yaml"], ["nowhere.yaml", "no such recipe"]),
        (["pretrain", "-c", "mine.yaml", "optim.lrr=1"], ["optim.lrr", "did you mean 'lr'"]),
        (["pretrain", "-c", "mine.yaml", "lr"], ["lr", "section.key=value"]),
        (["finetune", "-c", "mine.yaml"], ["kind 'pretrain'", "crossgate pretrain"]),
        (["pretrain", "-c", "mine.yaml"], ["data.index", "crossgate pack"]),
        (["pack", "nowhere.csv", "out"], ["nowhere.csv"]),
        (["pack", "mine.csv", "out", "--modalities", "rbg"], ["modalities", "did you mean 'rgb'", "pack --help"]),
        (["pack", "mine.csv", "out", "--short-side", "8"], ["short_side", "16", "found 8", "pack --help"]),
        (["pack", "mine.csv", "out", "--seconds", "nan"], ["seconds", "pack --help"]),
        (["pretrain", "-c", "mine.yaml", "run.name=../x"], ["run.name", "pattern"]),
        (["pretrain", "-c", "mine.yaml", "optim.lr=.inf"], ["optim.lr", "finite"]),
        (["predict", "nowhere", "video.mp4", "--depth-unit", "miles"], ["--depth-unit", "mm or"]),
        (["check", "nowhere"], ["nowhere"]),
        (["predict", "nowhere", "video.mp4"], ["nowhere"]),
        (["release", "nowhere"], ["nowhere"]),
        (["explain", "optmi"], ["did you mean 'optim'"]),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], fragments: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text("kind: pretrain\n")
    done = crossgate(*arguments, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("crossgate: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for fragment in fragments:
        assert fragment in lines[0]


def test_explain_names_types_and_defaults() -> None:
    done = crossgate("explain", "data.clip")
    assert "frames  [default 8; int >= 1]" in done.stdout


def test_version() -> None:
    from crossgate import __version__

    assert crossgate("--version").stdout.strip() == __version__


def test_idle_threads_sleep_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["crossgate", "--help"])
    for before, after in (("ACTIVE", "ACTIVE"), ("", "PASSIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
        if not before:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        with pytest.raises(SystemExit):
            main()
        assert os.environ["OMP_WAIT_POLICY"] == after


@pytest.mark.parametrize("more", [["--dry-run"], ["runs/mine"]])
def test_a_rollback_that_would_not_be_one_alone_is_refused(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from crossgate.cli import app

    monkeypatch.setattr("crossgate.registry.aliases.rollback", lambda *args, **more: pytest.fail("it moved the alias"))
    done = CliRunner().invoke(app, ["release", "--rollback", "crossgate-action", *more])
    assert done.exit_code and "--rollback: it gives the alias back at once" in str(done.exception)
