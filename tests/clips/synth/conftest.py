"""A small folder of clips, made once, and the folder of helpers on the import path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from crossgate.clips.synth import generate


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """A manifest of 36 clips, half of them degraded, made by two processes."""
    return generate(tmp_path_factory.mktemp("synth") / "few", clips=36, seed=5, workers=2)


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Path:
    """A manifest of enough clips to learn from; smaller pictures, to be quick."""
    out = tmp_path_factory.mktemp("synth") / "many"
    return generate(out, clips=180, seed=1, size=(96, 72), test=0.3, workers=2)
