"""What the schedule costs at the largest scale: a billion clips, 1,024 ranks of 8 loader processes each.

    python benchmarks/schedule_scale.py [--shards 100000] [--clips 10000] [--ranks 1024] [--workers 8]

The index is made up and lies on local disk; no clip is read. Start-up, memory and resuming are those of fresh processes
that take one rank's part: index, plan, first batch (imports are not in the times; torch is not in the memory). Times
are the best of five. What ranks read in common is counted over whole epochs, for all ranks, exactly:

- by clip: clips that two ranks read;
- by shard: what ranks would fetch twice, if each fetched every shard it touches whole, as the cache on disk does;
- by machine: the same for machines of 8 ranks that share one cache;
- after resizing: the same for an epoch whose thirds are read by 1,024, 896 and 1,024 ranks (of the given numbers).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossgate.modality import MODALITIES
from crossgate.stream.index import VERSION, Index, shard_table, shards_digest
from crossgate.stream.plan import TrainingPlan
from crossgate.stream.schedule import Schedule
from crossgate.stream.sidecar import ShardEntry

PER_MACHINE = 8
REPEATS = 5
CLIP_BYTES = 100_000


def make_index(folder: Path, shards: int, clips: int) -> None:
    """Writes the two files that opening an index reads."""
    entries = [
        ShardEntry(
            name=f"train-{number // 1000:05d}-{number % 1000:03d}.tar",
            split="train",
            clips=clips,
            bytes=clips * CLIP_BYTES,
            sha256=hashlib.sha256(f"a{number}".encode()).hexdigest(),
            layout=hashlib.sha256(f"b{number}".encode()).hexdigest(),
            modalities=dict.fromkeys(MODALITIES, clips),
            settings=hashlib.sha256(b"c").hexdigest(),
            etag=hashlib.md5(f"{number}".encode()).hexdigest(),
        )
        for number in range(shards)
    ]
    table, total = shard_table(entries), shards * clips
    header = {
        "version": VERSION,
        "digest": shards_digest(table),
        "splits": {"train": {"shards": shards, "clips": total, "groups": total}},
        "modalities": dict.fromkeys(MODALITIES, total),
        "vocabularies": {"action": ["run"]},
        "settings": {},
    }
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    (folder / "shards.parquet").write_bytes(buffer.getvalue())
    (folder / "index.json").write_text(json.dumps(header))


def peak_mb() -> float:
    """Returns the most memory that this process ever held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def one_rank(folder: str, global_batch: int, rank: int, ranks: int, workers: int) -> dict[str, float]:
    """Starts as a rank, resumes as one, and plans some thousand batches as each of its processes does."""
    imports = peak_mb()
    times: dict[str, float] = {}

    def start(name: str, share: float) -> TrainingPlan:
        wall, cpu = time.perf_counter(), time.process_time()
        selection = Index.load(folder).select(["train"], ["rgb"])
        plan = TrainingPlan(selection, seed=1, global_batch=global_batch, tail="drop", rank=rank, ranks=ranks)
        plan[int(plan.steps * share)]
        times[f"{name}_s"] = time.perf_counter() - wall
        times[f"{name}_cpu_s"] = time.process_time() - cpu
        return plan

    plan = start("startup", 0.0)
    peak = peak_mb()
    start("resume", 0.637)
    first, batches = plan.steps // 2, min(2000, plan.steps // 4)
    cpu = time.process_time()
    for number in range(first, first + workers * batches, workers):
        plan[number % plan.steps]
    planned = time.process_time() - cpu
    return times | {"rss_mb": peak, "imports_mb": imports, "us_per_clip": planned / batches / plan.share * 1e6}


def touched(schedule: Schedule, legs: list[tuple[float, float, int]], per_machine: int) -> float:
    """Returns by how many per cent more shards are fetched than there are, when readers fetch whole shards.

    Args:
        schedule: of an epoch.
        legs: ``(begin, end, ranks)``, shares of the epoch and who reads them. Readers keep what they have fetched.
        per_machine: ranks that fetch together.
    """
    shards, ends, turn = schedule._shards
    chunk, full, total = schedule.global_batch // schedule.lanes, schedule.full, schedule.total
    pairs: set[tuple[int, int]] = set()
    for begin, end, ranks in legs:
        share = schedule.global_batch // ranks
        for rank in range(ranks):
            for lane in range(rank * share // chunk, -(-(rank + 1) * share // chunk)):
                places = [(lane * full + int(full * edge)) * chunk for edge in (begin, end)]
                a, b = np.searchsorted(ends, [(places[0] + turn) % total, (places[1] - 1 + turn) % total], "right")
                span = range(a, b + 1) if a <= b else [*range(a, len(shards)), *range(b + 1)]
                pairs.update((rank // per_machine, shard) for shard in span)
    return (len(pairs) / len(np.flatnonzero(schedule.counts)) - 1) * 100


def clips_read_twice(plan_of, ranks: int, steps: int) -> int:
    """Counts clips that several ranks read, over some steps."""
    seen: dict[tuple[int, int], int] = {}
    plans = [plan_of(rank, ranks) for rank in range(ranks)]
    for step in range(steps):
        for plan in plans:
            unit = plan[step]
            for clip in zip(unit.shards.tolist(), unit.rows.tolist()):
                seen[clip] = seen.get(clip, 0) + 1
    return sum(times > 1 for times in seen.values())


def best(found: list[dict[str, float]]) -> dict[str, float]:
    """Returns the least of times, the most of memory."""
    return {name: (max if name.endswith("mb") else min)(part[name] for part in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--clips", type=int, default=10_000, help="of a shard")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "schedule_scale.md")
    parser.add_argument("--as-rank", nargs=2, metavar=("FOLDER", "RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ranks, fewer = arguments.ranks, arguments.ranks * 7 // 8
    global_batch = int(np.lcm(ranks, fewer))
    if arguments.as_rank:
        folder, rank = arguments.as_rank
        print(json.dumps(one_rank(folder, global_batch, int(rank), ranks, arguments.workers)))
        return

    with tempfile.TemporaryDirectory() as folder:
        make_index(Path(folder), arguments.shards, arguments.clips)
        command = [sys.executable, *sys.argv, "--as-rank", folder]
        runs = [
            json.loads(subprocess.run([*command, str(rank)], check=True, capture_output=True, text=True).stdout)
            for rank in np.linspace(0, ranks - 1, REPEATS).astype(int)
        ]
        cost = best(runs)
        selection = Index.load(folder).select(["train"])
        plan = TrainingPlan(selection, seed=1, global_batch=global_batch, tail="drop", ranks=ranks)
        schedule = plan.passes[0].schedule
        resized = [(0.0, 1 / 3, ranks), (1 / 3, 2 / 3, fewer), (2 / 3, 1.0, ranks)]

        def plan_of(rank: int, ranks: int) -> TrainingPlan:
            return TrainingPlan(selection, seed=1, global_batch=64, tail="drop", rank=rank, ranks=ranks)

        steady, resizing = "shards fetched again", f"the same, {ranks:,} -> {fewer:,} -> {ranks:,} ranks"
        figures = {"clips read by two ranks (16 ranks, 50 steps)": f"{clips_read_twice(plan_of, 16, 50)}"}
        for name, legs in ((steady, [(0.0, 1.0, ranks)]), (resizing, resized)):
            figures[f"{name}, each rank for itself"] = f"{touched(schedule, legs, 1):.2f} %"
            figures[f"{name}, machines of {PER_MACHINE} ranks"] = f"{touched(schedule, legs, PER_MACHINE):.2f} %"
    summary = {
        "startup_s": round(cost["startup_s"], 3),
        "rss_mb": round(cost["rss_mb"], 1),
        "us_per_clip": round(cost["us_per_clip"], 2),
        "resume_s": round(cost["resume_s"], 3),
        "reread_pct": float(figures["shards fetched again, each rank for itself"].split()[0]),
    }
    total = arguments.shards * arguments.clips
    scale = f"{total:,} clips in {arguments.shards:,} shards, {ranks:,} ranks of {arguments.workers} processes"
    rows = {
        "start-up": f"{cost['startup_s']:.2f} s ({cost['startup_cpu_s']:.2f} s of processor time)",
        "resuming at 63.7 % of the epoch": f"{cost['resume_s']:.2f} s ({cost['resume_cpu_s']:.2f} s)",
        "memory of a rank, at its peak": f"{cost['rss_mb']:.0f} MB, {cost['imports_mb']:.0f} MB of it imports",
        "planning": f"{cost['us_per_clip']:.1f} µs a clip, in batches of {global_batch // ranks} clips a rank",
        **figures,
    }
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    ]
    lines += [f"pyarrow {pa.__version__}; {scale}; global batch {global_batch:,}; times are the best of {REPEATS}", ""]
    lines += ["| what | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows.items())]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
