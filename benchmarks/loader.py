"""Clips a second of one process against plain webdataset: the same shards, the same decoded output, in one run.

    python benchmarks/loader.py [--clips 48] [--copies 10] [--rounds 5]

Generated clips of four modalities are packed, copied under other keys into a few shards, and read from local disk: in
shuffled order without augmentation, decoded by `clip_tensors` into batches of 16. The loaders take turns; the figures
are the best round of each in processor time (this process, no workers), since the machine may be shared. webdataset
shuffles shards and a buffer of 1,000 clips. `sequential` is the loader without its schedule: what exactness costs.
The S3 rows need SeaweedFS (`weed`), whose own processor time is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import torch
import webdataset as wds
from webdataset.gopen import gopen_schemes

from crossgate.clips.synth import generate
from crossgate.clips.tensors import clip_tensors
from crossgate.config import AugmentConfig, CacheConfig, ClipConfig, DataConfig
from crossgate.runs.pack import PackSettings, pack
from crossgate.stream.index import Index, write_index
from crossgate.stream.loader import ClipLoader, sequential
from crossgate.stream.reader import read_clips
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import open_store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "stream"))
BATCH, SHARDS, BUFFER = 16, 4, 1000
CLIP = ClipConfig()
Batches = Callable[[], Iterator[Any]]


def make_shards(folder: Path, clips: int, copies: int) -> str:
    """Packs generated clips and writes each several times under other names."""
    index = pack(generate(folder / "clips", clips=clips, degraded=0.0), str(folder / "packed"), PackSettings(workers=1))
    everything = index.select(index.splits)
    members = read_clips(index, everything, np.arange(everything.total))
    store, entries = open_store(str(folder / "shards")), []
    for shard in range(SHARDS):
        with ShardWriter(store, f"train-{shard:06d}.tar", split="train") as writer:
            for copy in range(shard, copies, SHARDS):
                for number, found in enumerate(members):
                    kept = {suffix: data for suffix, data in found.items() if suffix != "json"}
                    record = json.loads(found["json"]) | {"split": "train"}
                    del record["key"]
                    writer.add(f"clip-{copy:03d}-{number:04d}", kept, record)
        entries.append(writer.entry)
    write_index(store, entries)
    return store.url


def ours(url: str, state: dict[str, Any] | None = None, cache: str = "") -> Batches:
    index = Index.load(url)
    data = DataConfig(
        clip=CLIP, augment=AugmentConfig(enabled=False), global_batch=BATCH, cache=CacheConfig(folder=cache)
    )
    loader = ClipLoader(index, ["train"], data, seed=0)
    if state:
        loader.load_state_dict(loader.state_dict() | state)
    steps = loader.steps_per_epoch

    def batches() -> Iterator[Any]:
        for _, batch in zip(range(steps), loader):
            yield batch

    return batches


def without_schedule(url: str) -> Batches:
    index = Index.load(url)
    data = DataConfig(clip=CLIP, global_batch=BATCH)
    return lambda: sequential(index, ["train"], data, batch_size=BATCH)


def peer(url: str) -> Batches:
    """webdataset with the same decoding and the same kind of batch."""
    urls = [f"{url}/train-{shard:06d}.tar" for shard in range(SHARDS)]

    def decode(sample: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        return clip_tensors(members, CLIP, None, 0), sample["__key__"]

    def collate(samples: list[tuple[dict[str, torch.Tensor], str]]) -> dict[str, torch.Tensor]:
        batch = {}
        for name in CLIP.modalities:
            dtype = torch.uint8 if name == "rgb" else torch.float32
            batch[name] = torch.zeros((len(samples), *CLIP.shape(name)), dtype=dtype)
            for row, (tensors, _) in enumerate(samples):
                if name in tensors:
                    batch[name][row] = tensors[name]
        return batch

    dataset = wds.WebDataset(urls, shardshuffle=SHARDS, seed=0, empty_check=False).shuffle(BUFFER).map(decode)
    return lambda: iter(dataset.batched(BATCH, collation_fn=collate, partial=False))


def measure(batches: Batches) -> dict[str, float]:
    """Runs through an epoch; returns clips a second of processor and of wall time, and the first batch's seconds."""
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    first = 0.0
    for _ in batches():
        count += BATCH
        first = first or time.perf_counter() - wall
    return {
        "cpu": count / (time.process_time() - cpu),
        "wall": count / (time.perf_counter() - wall),
        "first_s": first,
    }


def in_turns(loaders: dict[str, Batches], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the best rates, and the median time to a first batch, of loaders that take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, batches in loaders.items():
            found[name].append(measure(batches))
    return {
        name: {
            "cpu": max(part["cpu"] for part in parts),
            "wall": max(part["wall"] for part in parts),
            "first_s": statistics.median(part["first_s"] for part in parts),
        }
        for name, parts in found.items()
    }


def from_s3(url: str, folder: Path, rounds: int, stack: ExitStack) -> dict[str, dict[str, float]]:
    """The same from a server on this machine; nothing where there is none."""
    import s3_server

    if s3_server.binary() is None:
        return {}
    (folder / "weed").mkdir()
    server = stack.enter_context(s3_server.seaweed(folder / "weed"))
    os.environ |= {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": s3_server.KEY,
        "AWS_SECRET_ACCESS_KEY": s3_server.SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3_server.client(server).create_bucket(Bucket="clips")
    local, remote = open_store(url), open_store("s3://clips/shards")
    for name in local.list():
        remote.put(name, Path(local.path(name)))
    gopen_schemes["s3"] = lambda url, mode, bufsize, **how: fsspec.filesystem("s3").open(
        url, "rb", block_size=16 << 20, cache_type="readahead"
    )
    found = in_turns({"crossgate": ours(remote.url), "webdataset": peer(remote.url)}, rounds)
    cached = ours(remote.url, cache=str(folder / "cache"))
    measure(cached)
    return found | in_turns({"crossgate, cached": cached}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        url = make_shards(folder, arguments.clips, arguments.copies)
        loaders = {"crossgate": ours(url), "crossgate, no schedule": without_schedule(url), "webdataset": peer(url)}
        local = in_turns(loaders, arguments.rounds)
        middle = {"epoch": 0, "step": arguments.clips * arguments.copies // BATCH // 2}
        start, resume = (
            statistics.median(first_batch(ours, url, state) for _ in range(arguments.rounds))
            for state in (None, middle)
        )
        remote = from_s3(url, folder, arguments.rounds, stack)
    summary = {
        "local_vs_best": round(local["crossgate"]["cpu"] / local["webdataset"]["cpu"], 3),
        "s3_vs_best": round(remote["crossgate"]["cpu"] / remote["webdataset"]["cpu"], 3) if remote else None,
        "exactness_cost_pct": round((local["crossgate, no schedule"]["cpu"] / local["crossgate"]["cpu"] - 1) * 100, 2),
        "resume_vs_start": round(resume / start, 3),
        "s3_cached_vs_best": round(remote["crossgate, cached"]["cpu"] / remote["webdataset"]["cpu"], 3)
        if remote
        else None,
        "webdataset": round(local["webdataset"]["cpu"], 1),
        "crossgate": round(local["crossgate"]["cpu"], 1),
    }
    total = arguments.clips * arguments.copies
    machine = f"{platform.machine()}, Python {platform.python_version()}, webdataset {wds.__version__}"
    lines = [
        f"{datetime.date.today()}, {machine}, {total} generated clips in {SHARDS} shards, best of {arguments.rounds}",
        "",
        "| from | loader | clips a second of processor time | of wall time | first batch, s |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for place, rows in (("local disk", local), ("S3 on loopback", remote)):
        for name, row in rows.items():
            lines.append(f"| {place} | {name} | {row['cpu']:.1f} | {row['wall']:.1f} | {row['first_s']:.3f} |")
    lines += ["", f"First batch after opening the index: {start:.3f} s; in mid-epoch, resumed: {resume:.3f} s."]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(json.dumps(summary))


def first_batch(make: Callable[..., Batches], url: str, state: dict[str, Any] | None) -> float:
    before = time.perf_counter()
    batches = make(url, state)()
    next(batches)
    taken = time.perf_counter() - before
    batches.close()  # type: ignore[attr-defined]
    return taken


if __name__ == "__main__":
    main()
