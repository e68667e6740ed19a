"""Each loader as its own users write it: the same clips, the same decoding, batches of the same tensors.

A loader here is a function of a `Place` that returns the batches of its first epoch, or with ``resume`` what is left of
it from the middle on, or None where it does not offer that. Converting is a function of the shards and a folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossgate.clips.tensors import clip_tensors
from crossgate.config import AugmentConfig, CacheConfig, ClipConfig, DataConfig
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader, sequential
from crossgate.stream.reader import read_clips

BATCH, BUFFER = 16, 1000
CLIP = ClipConfig()
SUFFIXES = ("json", "rgb.mp4", "flow.mp4", "audio.flac", "depth.mov")
Batches = Iterator[Any]


@dataclass(frozen=True)
class Place:
    """Where a loader reads and what it may write.

    Attributes:
        root: folder or ``s3://`` prefix with a folder a format: shards, litdata, mds, energon.
        scratch: folder for what it keeps on local disk, empty at a cold start.
        clips: in all.
    """

    root: str
    scratch: Path
    clips: int

    @property
    def remote(self) -> bool:
        return self.root.startswith("s3://")


def decoded(key: str, members: dict[str, bytes]) -> tuple[str, dict[str, torch.Tensor]]:
    return key, clip_tensors({suffix: data for suffix, data in members.items() if data}, CLIP, None, 0)


def collated(clips: list[tuple[str, dict[str, torch.Tensor]]]) -> dict[str, Any]:
    """One batch, its memory written once."""
    batch: dict[str, Any] = {"keys": [key for key, _ in clips]}
    batch["present"] = torch.tensor([[name in found for name in CLIP.modalities] for _, found in clips])
    for name in CLIP.modalities:
        dtype = torch.uint8 if name == "rgb" else torch.float32
        batch[name] = torch.empty((len(clips), *CLIP.shape(name)), dtype=dtype)
        for row, (_, found) in enumerate(clips):
            if name in found:
                batch[name][row] = found[name]
            else:
                batch[name][row] = 0
    return batch


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def everything(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields key and members of every clip of the shards, for those who need another format."""
    index = Index.load(url)
    selection = index.select(["train"])
    keys = [index.sidecar(shard).key(row) for shard in selection.shards for row in range(int(index.clips[shard]))]
    for start in range(0, selection.total, 64):
        places = np.arange(start, min(start + 64, selection.total))
        yield from zip(keys[start : start + 64], read_clips(index, selection, places))


# ---- crossgate ---------------------------------------------------------------------------------------------------


def crossgate(place: Place, *, resume: bool = False, cache: Path | None = None) -> Batches:
    index = Index.load(f"{place.root}/shards")
    kept = CacheConfig(folder=str(cache) if cache else "")
    data = DataConfig(clip=CLIP, augment=AugmentConfig(enabled=False), global_batch=BATCH, cache=kept)
    loader = ClipLoader(index, ["train"], data, seed=0)
    if resume:
        loader.load_state_dict(loader.state_dict() | {"step": loader.steps_per_epoch // 2})
    for _, batch in zip(range(loader.steps_per_epoch), loader):
        yield {"keys": batch.keys, "present": batch.present, **batch.streams}


def without_schedule(place: Place, *, resume: bool = False) -> Batches:
    """crossgate's reader and decoder in the order of the shards: what exactness costs."""
    index = Index.load(f"{place.root}/shards")
    data = DataConfig(clip=CLIP, global_batch=BATCH)
    for batch in sequential(index, ["train"], data, batch_size=BATCH):
        yield {"keys": batch.keys, "present": batch.present, **batch.streams}


# ---- webdataset --------------------------------------------------------------------------------------------------


def webdataset(place: Place, *, resume: bool = False) -> Batches | None:
    import fsspec
    import webdataset as wds
    from webdataset.gopen import gopen_schemes

    if resume:
        return None  # it has no state
    gopen_schemes["s3"] = lambda url, mode, bufsize, **how: fsspec.filesystem("s3").open(
        url, "rb", block_size=16 << 20, cache_type="readahead"
    )
    names = [name for name in Index.load(f"{place.root}/shards").names if name.startswith("train")]

    def decode(sample: dict[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
        return decoded(sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})

    urls = [f"{place.root}/shards/{name}" for name in names]
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(BUFFER).map(decode)
    return iter(dataset.batched(BATCH, collation_fn=collated, partial=False))


# ---- litdata -----------------------------------------------------------------------------------------------------


def _padded(item: tuple[str, dict[str, bytes]]) -> dict[str, Any]:
    key, members = item
    return {"key": key, **{suffix: members.get(suffix, b"") for suffix in SUFFIXES}}


def _of_padded(samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return collated([decoded(sample["key"], {s: sample[s] for s in SUFFIXES}) for sample in samples])


def to_litdata(url: str, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(emptied(folder)), chunk_bytes=32 << 20)
    for number, item in enumerate(everything(url)):
        cache[number] = _padded(item)
    cache.done()
    cache.merge()


def litdata(place: Place, *, resume: bool = False) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(place.scratch)
    if place.remote:  # its client refuses plain http, and no argument of its own reaches that setting
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    where = {"cache_dir": str(place.scratch / "litdata")} if place.remote else {}
    dataset = StreamingDataset(f"{place.root}/litdata", shuffle=True, seed=0, **where)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=_of_padded, drop_last=True)
    if resume:
        batches = iter(loader)
        for _ in range(place.clips // BATCH // 2):
            next(batches)
        state = loader.state_dict()
        dataset = StreamingDataset(f"{place.root}/litdata", shuffle=True, seed=0, **where)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=_of_padded, drop_last=True)
        loader.load_state_dict(state)
    return iter(loader)


# ---- mosaicml-streaming ------------------------------------------------------------------------------------------


def to_mds(url: str, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"key": "str", **dict.fromkeys(SUFFIXES, "bytes")}
    with MDSWriter(out=str(emptied(folder)), columns=columns, size_limit=32 << 20) as writer:
        for item in everything(url):
            writer.write(_padded(item))


def mds(place: Place, *, resume: bool = False) -> Batches:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    if place.remote:
        where = {"remote": f"{place.root}/mds", "local": str(place.scratch / "mds")}
    else:
        where = {"local": f"{place.root}/mds"}
    dataset = StreamingDataset(**where, shuffle=True, batch_size=BATCH, shuffle_seed=0)
    if resume:
        dataset.load_state_dict(dataset.state_dict(place.clips // 2, False))
    return iter(torch.utils.data.DataLoader(dataset, BATCH, collate_fn=_of_padded, drop_last=True))


# ---- Megatron-Energon --------------------------------------------------------------------------------------------


def to_energon(url: str, folder: Path) -> None:
    """The same tars, beside them what it keeps of them."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    emptied(folder)
    names = [name for name in Index.load(url).names if name.startswith("train")]
    for name in names:
        os.link(f"{url}/{name}", folder / name)
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    about = "__module__: megatron.energon\n__class__: CrudeWebdataset\ndecoder: null\nsubflavors: {}\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(about)


def energon(place: Place, *, resume: bool = False) -> Batches | None:
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset
    from megatron.energon.task_encoder.base import stateless

    root = place.root.replace("s3://", "msc://")  # a profile of `MSC_CONFIG`, named as the bucket

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "key": sample["__key__"]}

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(cook)]

        def __init__(self) -> None:
            super().__init__(batch_type=dict)

        @stateless
        def encode_sample(self, sample: dict[str, Any]) -> Any:
            key = sample["__key__"].rsplit("/", 1)[-1]
            return decoded(key, {s: sample[s] for s in SUFFIXES if s in sample})

        def batch(self, samples: list[Any]) -> dict[str, Any]:
            return collated(samples)

        def encode_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    def make() -> Any:
        workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = get_train_dataset(
            f"{root}/energon",
            worker_config=workers,
            batch_size=BATCH,
            shuffle_buffer_size=BUFFER,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
            repeat=False,
            batch_drop_last=True,
        )
        return get_savable_loader(dataset)

    return iter(make()) if not resume else None


LOADERS: dict[str, Callable[..., Batches | None]] = {
    "crossgate": crossgate,
    "crossgate, no schedule": without_schedule,
    "webdataset": webdataset,
    "litdata": litdata,
    "mosaicml-streaming": mds,
    "megatron-energon": energon,
}
CONVERTERS: dict[str, Callable[[str, Path], None]] = {
    "litdata": to_litdata,
    "mosaicml-streaming": to_mds,
    "megatron-energon": to_energon,
}
FORMATS = {"litdata": "litdata", "mosaicml-streaming": "mds", "megatron-energon": "energon"}
MODULES = {"litdata": "litdata", "mosaicml-streaming": "streaming", "megatron-energon": "megatron.energon"}
