"""Clips a second against webdataset, litdata, mosaicml-streaming and Megatron-Energon, in one run.

    python -m venv /tmp/peers
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \
        > /tmp/peers/lib/python3.11/site-packages/crossgate.pth
    /tmp/peers/bin/pip install obstore tifffile filetype mfusepy rapidyaml xattr 'wcmatch<11' tzdata azure-identity \
        azure-storage-blob azure-storage-file-datalake brotli catalogue google-cloud-storage oci 'paramiko<4' \
        python-snappy xxhash zstd
    /tmp/peers/bin/pip install --no-deps litdata mosaicml-streaming megatron-energon multi-storage-client \
        transformers tokenizers safetensors huggingface_hub
    PATH=$PWD/.venv/bin:$PATH /tmp/peers/bin/python benchmarks/loader.py [--clips 48] [--copies 10] [--rounds 5]

(mosaicml-streaming asks for an older numpy than crossgate, hence `--no-deps`.) A peer that is not installed is left
out; without the second environment `python benchmarks/loader.py` compares with webdataset alone.

Generated clips of four modalities are packed and copied under other keys into a few shards; litdata and
mosaicml-streaming get them converted, the others read the tars. Each loader has a process of its own without workers,
bound to the same core; they take turns, epoch by epoch, in shuffled order, with the same decoding (`clip_tensors`,
without augmentation) into batches of 16, and a digest shows that their output is the same. A ratio to a peer is the
median over rounds of crossgate's rate over the peer's in the same round, by processor time since the machine may be
shared; what is told is the least of them, the ratio to the best peer. "no schedule" is crossgate's loader without it:
what exactness costs. Cold means that a loader's folder on the local disk is empty; litdata and
mosaicml-streaming always have one, crossgate where it says "with a cache". The S3 rows need SeaweedFS (`weed`), whose
own processor time is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "peers"), str(HERE.parent / "tests" / "stream")]
from loaders import BATCH, CLIP, CONVERTERS, FORMATS, LOADERS, MODULES, Batches, Place, emptied  # noqa: E402

from crossgate.clips.synth import generate  # noqa: E402
from crossgate.runs.pack import PackSettings, pack  # noqa: E402
from crossgate.stream.index import write_index  # noqa: E402
from crossgate.stream.reader import read_clips  # noqa: E402
from crossgate.stream.shards import ShardWriter  # noqa: E402
from crossgate.stream.storage import open_store  # noqa: E402

SHARDS = 4
OWN = ("crossgate", "crossgate, no schedule")
KEEPING = "crossgate, with a cache"


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


def make_root(folder: Path, clips: int, copies: int) -> None:
    """Makes shards and every format of an installed peer, each in a process of its own."""
    make_shards(folder, clips, copies)
    for name in CONVERTERS:
        if installed(name):
            quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([sys.executable, __file__, "--convert", name, str(folder)], check=True, **quietly)  # type: ignore[call-overload]


def installed(name: str) -> bool:
    module = MODULES.get(name, "crossgate")
    return importlib.util.find_spec(module.split(".")[0]) is not None


# ---- a loader's process ------------------------------------------------------------------------------------------


def serve(name: str, root: str, scratch: Path, clips: int) -> None:
    """Answers each line of the input, a request as JSON, with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a loader prints
    place, loader = Place(root, scratch, clips), LOADERS[name]
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("cold", False):
            emptied(scratch)
        check = request.pop("check", False)
        short = request.pop("first_only", False)
        how = {key: Path(value) if key == "cache" else value for key, value in request.items()}
        gc.collect()
        try:
            found = measured(partial(loader, place, **how), check, short)
        except Exception as error:  # a peer's failure is a result too
            found = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(found), file=answers, flush=True)


def measured(make: Callable[[], Batches | None], check: bool, short: bool) -> dict[str, Any]:
    """Runs through an epoch: clips a second of processor and of wall time, seconds to the first batch, digests."""
    wall, cpu, count, first, digests = time.perf_counter(), time.process_time(), 0, 0.0, {}
    batches = make()
    if batches is None:
        return {"error": "not offered"}
    for batch in batches:
        count += len(batch["keys"])
        first = first or time.perf_counter() - wall
        if check:
            digests |= digests_of(batch)
        if short:
            break
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    del batches
    return {"cpu": count / cpu, "wall": count / wall, "first_s": first, "clips": count, "digests": digests}


def digests_of(batch: dict[str, Any]) -> dict[str, str]:
    found = {}
    for row, key in enumerate(batch["keys"]):
        digest = hashlib.sha256(batch["present"][row].numpy().tobytes())
        for name in CLIP.modalities:
            digest.update(batch[name][row].contiguous().numpy().tobytes())
        found[key.rsplit("/", 1)[-1]] = digest.hexdigest()[:16]
    return found


class Loader:
    """A loader's process, bound to one core."""

    def __init__(self, name: str, root: str, folder: Path, clips: int) -> None:
        self.name, self.scratch = name, emptied(folder / "scratch" / name.replace(", ", "-").replace(" ", "-"))
        command = [sys.executable, __file__, "--serve", name, root, str(self.scratch), str(clips)]
        self._log = open(folder / "scratch" / f"{self.scratch.name}.log", "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment()
        )
        os.sched_setaffinity(self._process.pid, {max(os.sched_getaffinity(0))})

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns what the process measured."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "its process died"}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


# ---- rounds ------------------------------------------------------------------------------------------------------


def in_turns(root: str, folder: Path, clips: int, rounds: int) -> tuple[dict[str, list[dict]], list[str]]:
    """Returns every loader's rounds, and a line for each that is left out."""
    left_out = [f"{name}: not installed" for name in LOADERS if not installed(name)]
    with ExitStack() as stack:
        running = {}
        for name in LOADERS:
            if installed(name):
                running[name] = Loader(name, root, folder, clips)
                stack.callback(running[name].close)
        expected = running["crossgate"].ask(check=True, cold=True)["digests"]
        for name in list(running):
            answer = running[name].ask(check=True, cold=True)
            if answer.get("digests") != expected:
                left_out.append(f"{name}: {answer.get('error', 'other clips or tensors than crossgate')}")
                running.pop(name)
        remote = root.startswith("s3://")
        found: dict[str, list[dict]] = {name: [] for name in [*running, *([KEEPING] if remote else [])]}
        for _ in range(rounds):
            for name, loader in running.items():
                found[name].append(loader.ask(cold=True))
            if remote:
                found[KEEPING].append(running["crossgate"].ask(cold=True, cache=kept_by(running["crossgate"])))
        for name, loader in running.items():
            for part, start, resume in zip(found[name], *first_batches(loader, rounds)):
                part["start_s"], part["resume_s"] = start, resume
        if remote:
            found |= from_caches(running, rounds)
    return found, left_out


def first_batches(loader: Loader, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the seconds to a first batch after a start and in mid-epoch, taken in turns, caches cold."""
    pairs = [
        [loader.ask(first_only=True, resume=resume, cold=True).get("first_s", float("nan")) for resume in (False, True)]
        for _ in range(rounds)
    ]
    return [start for start, _ in pairs], [resume for _, resume in pairs]


def kept_by(loader: Loader) -> str:
    return str(loader.scratch / "cache")


def from_caches(running: dict[str, Loader], rounds: int) -> dict[str, list[dict]]:
    """The same once everything lies on the local disk, for those who keep it there."""
    how = {name: {"cache": kept_by(loader)} if name == "crossgate" else {} for name, loader in running.items()}
    keepless = ("webdataset", "megatron-energon", "crossgate, no schedule")
    kept = [name for name in running if name not in keepless]
    for name in kept:
        for _ in range(2):  # crossgate's cache is filled beside the first epoch
            running[name].ask(**how[name])
    found: dict[str, list[dict]] = {f"{name}, cached": [] for name in kept}
    for _ in range(rounds):
        for name in kept:
            found[f"{name}, cached"].append(running[name].ask(**how[name]))
    return found


def on_s3(local: Path, stack: ExitStack, folder: Path) -> str:
    """Puts everything onto a server on this machine; returns its URL, or nothing where there is no server."""
    import s3_server

    if s3_server.binary() is None:
        return ""
    (folder / "weed").mkdir()
    server = stack.enter_context(s3_server.seaweed(folder / "weed"))
    os.environ |= {
        "AWS_ENDPOINT_URL": server,
        "S3_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": s3_server.KEY,
        "AWS_SECRET_ACCESS_KEY": s3_server.SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MSC_CONFIG": str(folder / "energon.json"),
    }
    credentials = {"access_key": s3_server.KEY, "secret_key": s3_server.SECRET}
    profile = {
        "storage_provider": {
            "type": "s3",
            "options": {"base_path": "clips", "endpoint_url": server, "region_name": "us-east-1"},
        },
        "credentials_provider": {"type": "S3Credentials", "options": credentials},
    }
    (folder / "energon.json").write_text(json.dumps({"profiles": {"clips": profile}}))
    client = s3_server.client(server)
    client.create_bucket(Bucket="clips")
    for path in local.rglob("*"):
        if path.is_file() and path.relative_to(local).parts[0] in ("shards", *FORMATS.values()):
            client.upload_file(str(path), "clips", str(path.relative_to(local)))
    return "s3://clips"


# ---- the table ---------------------------------------------------------------------------------------------------


def middle(parts: list[dict], what: str) -> float:
    return statistics.median(part.get(what, float("nan")) for part in parts)


def against_best(found: dict[str, list[dict]], mine: str, what: str, peers: list[str]) -> float | None:
    """Returns the least of my ratios to the peers, each the median over rounds of my rate over its rate there."""
    if not peers:
        return None
    ratios = [
        statistics.median(own[what] / part[what] for own, part in zip(found[mine], found[name]) if what in part)
        for name in peers
    ]
    return round(min(ratios), 3)


def summarised(local: dict[str, list[dict]], remote: dict[str, list[dict]]) -> dict[str, Any]:
    def peers(found: dict[str, list[dict]], cached: bool) -> list[str]:
        return [n for n in found if not n.startswith("crossgate") and n.endswith(", cached") == cached]

    pairs = zip(local[OWN[1]], local[OWN[0]])
    cost = statistics.median((plain["cpu"] / exact["cpu"] - 1) * 100 for plain, exact in pairs)
    resume = statistics.median(part["resume_s"] / part["start_s"] for part in local[OWN[0]])
    summary: dict[str, Any] = {
        "local_vs_best": against_best(local, "crossgate", "cpu", peers(local, False)),
        "s3_vs_best": against_best(remote, "crossgate", "cpu", peers(remote, False)) if remote else None,
        "exactness_cost_pct": round(cost, 2),
        "resume_vs_start": round(resume, 3),
        "local_vs_best_wall": against_best(local, "crossgate", "wall", peers(local, False)),
        "s3_vs_best_wall": against_best(remote, "crossgate", "wall", peers(remote, False)) if remote else None,
        "s3_with_cache_vs_best": against_best(remote, KEEPING, "cpu", peers(remote, False)) if remote else None,
        "s3_cached_vs_best": against_best(remote, "crossgate, cached", "cpu", peers(remote, True)) if remote else None,
    }
    rates = {name: round(middle(parts, "cpu"), 1) for name, parts in local.items()}
    return summary | rates | {f"{name}, s3": round(middle(parts, "cpu"), 1) for name, parts in remote.items()}


def table(local: dict[str, list[dict]], remote: dict[str, list[dict]]) -> Iterator[str]:
    yield "| from | loader | clips/s of processor time | of wall time | first batch, s | resumed in mid-epoch, s |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for where, found in (("local disk", local), ("S3 on loopback", remote)):
        for name, parts in found.items():
            times = [middle(parts, what) for what in ("start_s", "resume_s")]
            shown = ["" if value != value else f"{value:.2f}" for value in times]
            rates = f"{middle(parts, 'cpu'):.1f} | {middle(parts, 'wall'):.1f}"
            yield f"| {where} | {name} | {rates} | {shown[0]} | {shown[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "loader.md")
    parser.add_argument("--convert", nargs=2, metavar=("PEER", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=4, metavar=("LOADER", "ROOT", "SCRATCH", "CLIPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.convert:
        name, folder = arguments.convert
        CONVERTERS[name](f"{folder}/shards", Path(folder) / FORMATS[name])
        return
    if arguments.serve:
        name, root, scratch, clips = arguments.serve
        serve(name, root, Path(scratch), int(clips))
        return

    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        make_root(folder, arguments.clips, arguments.copies)
        total = arguments.clips * arguments.copies
        local, left_out = in_turns(str(folder), folder, total, arguments.rounds)
        url = on_s3(folder, stack, folder)
        remote, also = in_turns(url, folder, total, arguments.rounds) if url else ({}, ["S3: no server here"])
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, {total} generated clips",
        f"in {SHARDS} shards, batches of {BATCH}, medians of {arguments.rounds} rounds. Where other work ran on the",
        "machine, compare processor time: wall time says little.",
        "",
        *table(local, remote),
        "",
        *(f"Left out from {where}: {line}." for where, out in (("local disk", left_out), ("S3", also)) for line in out),
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(json.dumps(summarised(local, remote)))


if __name__ == "__main__":
    main()
