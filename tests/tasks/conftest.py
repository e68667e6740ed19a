"""Recipes and batches small enough to run in milliseconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """The worker of the parity test, whose recipe and clips the other tests use too."""
    spec = importlib.util.spec_from_file_location("tasks_ranks_worker", Path(__file__).with_name("ranks_worker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
