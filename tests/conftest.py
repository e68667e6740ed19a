"""Shared fixtures. crossgate comes first: it must be imported before timm on a CPU build of torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import crossgate  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_ENABLE_TELEMETRY", "false")

_CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real clips; tests that use it carry the mark `corpus`. In CI it must be there."""
    if not _CORPUS.exists():
        if os.environ.get("CI"):
            pytest.fail(f"no real clips at {_CORPUS}")
        pytest.skip("the real clips are not on this machine")
    return _CORPUS
