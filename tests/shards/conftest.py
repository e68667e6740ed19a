"""The adapters of `shards/` are scripts, not a package: they are imported by their file names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_videos import write_video

sys.path += [str(Path(__file__).resolve().parents[2] / "shards"), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video of one second."""
    path = tmp_path_factory.mktemp("tiny") / "video.avi"
    write_video(path, 0)
    return path.read_bytes()
