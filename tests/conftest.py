"""Shared fixtures. crossgate comes first: it must be imported before timm on a CPU build of torch."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crossgate  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

sys.path.insert(0, str(Path(__file__).parent / "runs"))  # tiny_road, which tests of several rooms use
sys.path.append(str(Path(__file__).parent))  # free_ports

_SCREEN = pytest.StashKey[int]()
_CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SCREEN] = os.dup(2)  # what stderr is before pytest captures it


@pytest.hookimpl(tryfirst=True)  # before xdist reads them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (`pytest -n 2`), a file's tests stay in one process, and so do all that start a Ray."""
    for item in items:
        together = "ray" if item.get_closest_marker("ray") else ".".join(item.path.parts[-2:])
        item.add_marker(pytest.mark.xdist_group(together))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that its timeout's signal cannot free (a wait in C) ends the process, with every thread's stack shown."""
    mark = item.get_closest_marker("timeout")
    limit = mark.args[0] if mark else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + 60, exit=True, file=item.config.stash[_SCREEN])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def same_import_path() -> Iterator[None]:
    """MLflow puts a packaged model's code on the import path; processes that later tests start must not find it."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real clips; tests that use it carry the mark `corpus`. In CI it must be there."""
    if not _CORPUS.exists():
        if os.environ.get("CI"):
            pytest.fail(f"no real clips at {_CORPUS}")
        pytest.skip("the real clips are not on this machine")
    return _CORPUS


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``clips/manifest.csv`` (36 generated clips) and ``shards/``."""
    from crossgate.clips.synth import generate
    from crossgate.runs.pack import PackSettings, pack

    folder = tmp_path_factory.mktemp("road")
    manifest = generate(folder / "clips", clips=36, workers=1)
    pack(manifest, str(folder / "shards"), PackSettings(workers=1))
    return folder
