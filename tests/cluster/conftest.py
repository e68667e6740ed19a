"""Lets the tests of this room, and Ray's workers, import `tiny_run` of the training tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TINY = str(Path(__file__).resolve().parents[1] / "training")
HERE = str(Path(__file__).resolve().parent)
sys.path[:0] = [TINY, HERE]


@pytest.fixture(scope="session")
def ray_cluster():
    """One private Ray cluster for all tests that need one; starting it takes most of their time."""
    from crossgate.cluster.session import ray_session
    from crossgate.config import ClusterConfig

    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (TINY, HERE, before)))
    try:
        with ray_session(ClusterConfig(address="local"), cpus=2.5) as ray:
            yield ray
    finally:
        os.environ["PYTHONPATH"] = before
