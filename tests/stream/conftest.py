"""Fixtures of small corpora and settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossgate.config import AugmentConfig, ClipConfig, DataConfig
from crossgate.stream.index import Index
from crossgate.stream.storage import Store, open_store

sys.path.insert(0, str(Path(__file__).parent))  # worker processes inherit it and find the stub codec
from small_corpora import write_corpus


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Index]:
    """``make_corpus({"train": [5, 0, 3]})`` -> index of a new folder."""
    folders = iter(range(1000))
    return lambda counts, **how: write_corpus(str(tmp_path / f"corpus{next(folders)}"), counts, **how)


@pytest.fixture
def settings() -> Callable[..., DataConfig]:
    """Small clips of picture and sound, without workers unless asked for."""

    def make(**changes) -> DataConfig:
        clip = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
        return DataConfig(**({"clip": clip, "augment": AugmentConfig(), "global_batch": 4} | changes))

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))
