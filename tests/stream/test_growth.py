"""Five epochs with worker processes over the network: neither memory nor files nor sockets grow."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch.utils.data.dataloader import _BaseDataLoaderIter
from web import serving

from crossgate.batch import ClipBatch
from crossgate.clips.synth import generate
from crossgate.config import ClipConfig, DataConfig
from crossgate.runs.pack import PackSettings, pack
from crossgate.stream.index import Index, write_index
from crossgate.stream.loader import ClipLoader
from crossgate.stream.reader import read_clips
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import open_store

pytestmark = pytest.mark.slow
SHARDS, CLIPS, WORKERS = 6, 16, 2
MIB = 1 << 20


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Generated clips of four modalities, each in every shard, behind a web server."""
    folder = tmp_path_factory.mktemp("growth")
    packed = pack(
        generate(folder / "clips", clips=CLIPS, degraded=0.0), str(folder / "packed"), PackSettings(workers=1)
    )
    everything = packed.select(packed.splits)
    members = read_clips(packed, everything, np.arange(everything.total))
    store, entries = open_store(str(folder / "shards")), []
    for shard in range(SHARDS):
        with ShardWriter(store, f"train-{shard:06d}.tar", split="train") as writer:
            for number, found in enumerate(members):
                record = {"group": f"{number}", "split": "train", "frames": 16, "fps": 8.0}
                kept = {suffix: data for suffix, data in found.items() if suffix != "json"}
                writer.add(f"clip-{shard}-{number}", kept, record)
        entries.append(writer.entry)
    write_index(store, entries)
    with serving(Path(store.url)) as web:
        yield web.url


def held(process: psutil.Process) -> tuple[float, int, int]:
    """Returns MiB that are this process's own, open files, and sockets."""
    return process.memory_full_info().uss / MIB, process.num_fds(), len(process.net_connections())


def test_nothing_grows_in_five_epochs(url: str) -> None:
    data = DataConfig(clip=ClipConfig(size=64), global_batch=8, loader_workers=WORKERS, prefetch=2)
    loader = ClipLoader(Index.load(url), ["train"], data, seed=0)
    me = psutil.Process()
    others = me.children(recursive=True)  # of other tests: a Ray that a session keeps
    batches = iter(loader)
    for _ in range(5 * loader.steps_per_epoch):
        next(batches)
    workers = [child for child in me.children(recursive=True) if child not in others and child.num_threads() > 1]
    assert len(workers) >= WORKERS

    def epoch() -> np.ndarray:
        """Returns what each process held when it held least: batches that wait take memory and files."""
        samples = []
        for step in range(loader.steps_per_epoch):
            next(batches)
            if step % 3 == 0:
                samples.append([held(process) for process in (me, *workers)])
        return np.min(samples, axis=0)  # (processes, MiB and files and sockets)

    seen, growth = [], np.inf
    # Allocators take arenas until they have enough, in some processes late; a leak grows in every stretch of epochs.
    for _ in range(6):
        stretch = [epoch() for _ in range(5)]
        seen.append(np.round(stretch, 1))
        growth = np.max(stretch[3:], axis=0) - np.max(stretch[:2], axis=0)
        # A batch on its way is a file for each of its tensors; one file more a batch would be 18 by then.
        if (growth <= (3.0, 12, 4)).all():
            break
    batches.close()  # type: ignore[attr-defined]
    assert loader.meters()["data/bad_clips"] == 0
    assert (growth <= (3.0, 12, 4)).all(), f"MiB, files, sockets of trainer and workers:\n{seen}"


def test_nothing_is_left_behind_by_iterators_that_are_let_go(url: str) -> None:
    data = DataConfig(clip=ClipConfig(size=64), global_batch=8, loader_workers=1, prefetch=2)
    loader, me, after = ClipLoader(Index.load(url), ["train"], data, seed=0), psutil.Process(), []

    def let_one_go() -> tuple[float, ...]:
        """Returns MiB, files, sockets, children and threads that are left, and batches and pools of workers."""
        batches = iter(loader)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        gc.collect()
        left = [sum(isinstance(one, kind) for one in gc.get_objects()) for kind in (ClipBatch, _BaseDataLoaderIter)]
        return (*held(me), len(me.children(recursive=True)), threading.active_count(), *left)

    let_one_go()
    # Here too allocators take arenas until they have enough; a leak grows in every stretch.
    for _ in range(6):
        stretch = [let_one_go() for _ in range(4)]
        after.append(np.round(stretch, 1))
        growth = np.subtract(stretch[3], stretch[0])
        if growth[0] <= 3.0:
            break
    assert growth[0] <= 3.0, f"MiB after every iterator:\n{after}"
    first, last = after[0][0], after[-1][3]
    assert (last[1:] - first[1:] <= (2, 2, 0, 0, 0, 0)).all(), after
