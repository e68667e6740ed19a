"""The cache of shards: one fetch a machine, whole or not at all, bounded, and never in the way."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from open_files import opened
from small_corpora import write_corpus
from stub_codec import number_tensors
from web import Web, serving

from crossgate.config import CacheConfig, ClipConfig, DataConfig
from crossgate.errors import UserError
from crossgate.stream import cache as cache_module
from crossgate.stream import loader as loader_module
from crossgate.stream.cache import RemoteShard, ShardCache, ShardChanged
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader
from crossgate.stream.storage import open_store

SIZE = 300_000
CLIP = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
HERE = Path(__file__).parent


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "web").mkdir()
    with serving(tmp_path / "web") as running:
        yield running


@pytest.fixture
def shard(web: Web) -> Callable[[str], RemoteShard]:
    """``shard("a")`` -> a remote file of `SIZE` bytes of its own."""

    def make(name: str) -> RemoteShard:
        content = hashlib.shake_256(name.encode()).digest(SIZE)
        (web.folder / f"{name}.tar").write_bytes(content)
        return RemoteShard(open_store(web.url), f"{name}.tar", SIZE, hashlib.sha256(content).hexdigest())

    return make


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard counts as in use."""
    monkeypatch.setattr(cache_module, "IN_USE", -1.0)


def start(web: Web, folder: Path, first: int, shards: list[RemoteShard]) -> subprocess.Popen[str]:
    described = [f"{s.name}:{s.bytes}:{s.sha256}" for s in shards]
    command = [sys.executable, HERE / "cache_process.py", web.url, folder, str(10 * SIZE), str(first), *described]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)


def until(happened: Callable[[], object]) -> None:
    """Waits for something that happens in the background."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def whole(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.tar")}


def test_many_processes_fetch_each_shard_once(web: Web, shard, tmp_path: Path) -> None:
    shards = [shard(name) for name in "abcde"]
    web.meddle = lambda name, first, body: time.sleep(0.05) or body  # so that they meet
    running = [start(web, tmp_path / "cache", first, shards) for first in range(4)]
    fetched = [int(process.communicate(timeout=200)[0]) for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sum(fetched) == 5 * SIZE
    assert web.given == {s.name: SIZE for s in shards}
    assert whole(tmp_path / "cache") == {s.key for s in shards}
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_killed_process_leaves_nothing_half(web: Web, shard, tmp_path: Path) -> None:
    """Killed while the shard is on its way: what it left is not read, and the next one clears it and fetches."""
    first, second, folder = shard("a"), shard("b"), tmp_path / "cache"
    asked, go_on = threading.Event(), threading.Event()

    def hold(name: str, start: int, body: bytes) -> bytes:
        asked.set()
        go_on.wait(120)
        return body

    web.meddle = hold
    process = start(web, folder, 0, [first])
    assert asked.wait(120)
    mine = ShardCache(folder, 2 * SIZE)
    assert not mine.add(first), "another process is at it"
    process.kill()
    process.wait()
    go_on.set()
    assert whole(folder) == set()
    assert [path.stat().st_size for path in folder.glob("*.partial")] == [SIZE], "it took its room at once"
    assert mine.add(second)
    assert not list(folder.glob("*.partial")), "nobody holds what the dead one began"
    assert mine.add(first)
    assert mine.read(first, [(0, 10), (SIZE - 5, SIZE)]) == [
        (web.folder / "a.tar").read_bytes()[:10],
        (web.folder / "a.tar").read_bytes()[-5:],
    ]


def test_least_recently_used_make_room(idle, shard, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE + 10)
    shards = [shard(name) for name in "abcd"]
    for age, item in zip((30, 20), shards):
        assert cache.add(item)
        past = time.time() - age
        os.utime(cache.folder / item.key, (past, past))
    assert cache.read(shards[0], [(0, 1)])
    assert cache.add(shards[2])
    assert whole(cache.folder) == {shards[0].key, shards[2].key}
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.limit


def test_shards_in_use_are_not_pushed_out(shard, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", SIZE)
    a, b = shard("a"), shard("b")
    assert cache.add(a)
    assert not cache.add(b)
    assert whole(cache.folder) == {a.key}
    assert "in use at once exceed data.cache.size_gb" in cache.notes[0]
    small = ShardCache(tmp_path / "small", SIZE - 1)
    assert not small.add(a)
    assert "less than one shard" in small.notes[0]


def test_another_content_is_refused_by_name(web: Web, shard, tmp_path: Path) -> None:
    cache, item = ShardCache(tmp_path / "cache", 10 * SIZE), shard("a")
    (web.folder / "a.tar").write_bytes(bytes(SIZE))
    with pytest.raises(ShardChanged, match="a.tar: the shard changed since it was indexed: its SHA-256"):
        cache.add(item)
    assert whole(cache.folder) == set()
    cache.want(item)
    with pytest.raises(ShardChanged, match="a.tar"):
        until(lambda: cache.want(item))
    cache.close()


def test_what_broke_on_its_way_is_fetched_again(web: Web, shard, tmp_path: Path) -> None:
    item, seen = shard("a"), []

    def spoil_once(name: str, first: int, body: bytes) -> bytes:
        seen.append(name)
        return bytes(len(body)) if len(seen) == 1 else body

    web.meddle = spoil_once
    assert ShardCache(tmp_path / "cache", 10 * SIZE).add(item)
    assert len(seen) == 2


def test_a_file_that_somebody_cut_is_not_believed(shard, tmp_path: Path) -> None:
    cache, item = ShardCache(tmp_path / "cache", 10 * SIZE), shard("a")
    assert cache.add(item)
    os.truncate(cache.folder / item.key, 100)
    assert cache.read(item, [(0, 200)]) is None
    assert whole(cache.folder) == set()
    assert cache.add(item)


# ---- through the loader ------------------------------------------------------------------------------------------


@pytest.fixture
def remote(web: Web) -> Index:
    """Two shards of twelve clips on a server that can be told to misbehave."""
    write_corpus(str(web.folder), {"train": [12, 12]})
    return Index.load(web.url)


def loader(index: Index, folder: Path | str, **changes) -> ClipLoader:
    cache = CacheConfig(folder=str(folder), size_gb=1)
    data = DataConfig(clip=CLIP, global_batch=6, cache=cache, **changes)
    return ClipLoader(index, ["train"], data, seed=0, decode=number_tensors)


def epoch(found: ClipLoader) -> list[int]:
    batches = iter(found)
    clips = [clip for _ in range(found.steps_per_epoch) for clip in next(batches).clip.tolist()]
    batches.close()  # type: ignore[attr-defined]
    return clips


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_from_the_cache_ask_nothing_of_the_store(web: Web, remote: Index, tmp_path: Path, workers: int) -> None:
    folder, plain = tmp_path / "cache", loader(remote, "")
    expected = epoch(plain) + epoch(plain)
    until(lambda: epoch(loader(remote, folder)) == expected[:24] and len(whole(folder)) == 2)
    with serving(web.folder) as other:  # of the first one, loaders that were closed may still have requests under way
        cached = loader(Index.load(other.url), folder, loader_workers=workers)
        found = epoch(cached) + (epoch(cached) if not workers else [])
        assert found == expected[: len(found)]
        assert not {name for name in other.given if name.endswith(".tar")}
    assert (cached.meters()["data/read_bytes"], cached.meters()["data/cache_bytes"] > 0) == (0, True)


def test_a_full_disk_means_going_on_without(web: Web, remote: Index, tmp_path: Path, caplog) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], capture_output=True).returncode:
        pytest.skip("a disk of 16 KiB cannot be mounted here")
    try:
        found = loader(remote, disk)
        with caplog.at_level(logging.WARNING):
            assert sorted(epoch(found) + epoch(found)) == sorted(2 * list(range(24)))
        assert caplog.text.count("no more shards are kept here (No space left on device); reading on without") == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_checkpoints_keep_their_place_on_the_disk(remote: Index, tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(cache_module, "RESERVE", 1 << 60)
    found = loader(remote, tmp_path / "cache")
    assert sorted(epoch(found) + epoch(found)) == sorted(2 * list(range(24)))
    assert whole(tmp_path / "cache") == set()
    assert caplog.text.count("No space left on device") == 1


def test_a_folder_that_cannot_be_made_is_one_warning(remote: Index, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    found = loader(remote, tmp_path / "file" / "cache")
    assert sorted(epoch(found) + epoch(found)) == sorted(2 * list(range(24)))
    assert caplog.text.count("no more shards are kept here") == 1


def test_a_shard_of_equal_length_and_other_bytes_stops_the_run(web: Web, remote: Index, tmp_path: Path) -> None:
    path = web.folder / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    batches = iter(loader(remote, tmp_path / "cache"))
    with pytest.raises(UserError, match="train-000001.tar: the shard changed since it was indexed: its SHA-256"):
        until(lambda: next(batches) is None)


def test_batches_travel_while_the_trainer_computes(web: Web, remote: Index) -> None:
    """After the first batch, without a call for another, the next ones come: here the whole epoch."""
    seen: set[tuple[str, int]] = set()
    web.meddle = lambda name, first, body: seen.add((name, first)) or body
    everything = {
        (remote.names[shard], min(offset for offset, _ in remote.sidecar(shard).members(row).values()))
        for shard in range(2)
        for row in range(12)
    }
    found = loader(remote, "")
    assert found.steps_per_epoch <= loader_module.AHEAD + 1
    batches = iter(found)
    next(batches)
    until(lambda: everything <= seen)
    batches.close()  # type: ignore[attr-defined]


def test_sockets_and_files_do_not_pile_up(remote: Index, tmp_path: Path) -> None:
    found = loader(remote, tmp_path / "cache")
    epoch(found)
    until(lambda: len(whole(tmp_path / "cache")) == 2 or epoch(found) is None)
    before, threads = opened(), threading.active_count()
    for _ in range(5):
        epoch(found)
    assert opened()["tar"] <= before["tar"]
    until(lambda: opened()["socket"] <= before["socket"] + 1)
    until(lambda: threading.active_count() <= threads)
