"""Worker processes end with the process that started them, even if that is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from crossgate.workers import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(280)
"""
LOADER = """
import sys, time
sys.path.insert(0, {stream!r})
from small_corpora import write_corpus
from stub_codec import number_tensors
from crossgate.config import ClipConfig, DataConfig
from crossgate.stream.loader import ClipLoader

if __name__ == "__main__":
    clip = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
    data = DataConfig(clip=clip, global_batch=4, loader_workers=2)
    index = write_corpus({corpus!r}, {{"train": [8, 8]}})
    batches = iter(ClipLoader(index, ["train"], data, seed=0, decode=number_tensors))
    next(batches), next(batches)
    print("both workers have made a batch", flush=True)
    time.sleep(280)
"""


@pytest.mark.parametrize(("script", "processes"), [(POOL, 1), (LOADER, 3)], ids=["pool", "loader and its server"])
def test_workers_end_with_a_killed_parent(script: str, processes: int, tmp_path: Path) -> None:
    stream = Path(__file__).with_name("stream")
    (tmp_path / "parent.py").write_text(script.format(stream=str(stream), corpus=str(tmp_path / "corpus")))
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert len(family) >= processes
    until = time.monotonic() + 120
    while (alive := [process for process in family if lives(process)]) and time.monotonic() < until:
        time.sleep(0.1)
    for process in alive:
        process.kill()
    assert not alive


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
