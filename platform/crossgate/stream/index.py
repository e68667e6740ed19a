"""The index of a folder of shards: ``index.json`` (small), ``shards.parquet`` (a row a shard), a sidecar a shard.

Opening an index reads the first two only, so that a billion clips cost what their shards cost; sidecars are read
when a clip of theirs is.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from crossgate.errors import Unreachable, UserError, nearest
from crossgate.modality import MODALITIES
from crossgate.stream.sidecar import ANEW, ShardEntry, Sidecar, finished_shard, group_hash, sidecar_name
from crossgate.stream.storage import Store, open_store
from crossgate.stream.survey import finished_shards, survey

__all__ = ["Index", "Selection", "SplitInfo", "group_hash", "write_index"]

VERSION = 1
_ROWS = 4096
_LISTED = 10_000  # shards of a folder that is still listed whole: some 20 requests
_SCHEMA = pa.schema(
    [("name", pa.string()), ("split", pa.string()), ("clips", pa.int64()), ("bytes", pa.int64())]
    + [("sha256", pa.string()), ("layout", pa.string())]
    + [(f"clips_{name}", pa.int64()) for name in MODALITIES]
    + [("settings", pa.string()), ("etag", pa.string())]
)


@dataclass(frozen=True)
class SplitInfo:
    """Size of a split."""

    shards: int
    clips: int
    groups: int


@dataclass(frozen=True)
class Selection:
    """The shards of some splits, in canonical order.

    Attributes:
        index: where they come from.
        splits: their names.
        shards: ``(S,)`` int64, numbers of the shards in the index.
        counts: ``(S,)`` int64, clips in each.
        digest: SHA-256 over these shards alone: other splits may change without touching the schedule.
        modalities: modality -> clips that have it.
    """

    index: Index
    splits: tuple[str, ...]
    shards: np.ndarray
    counts: np.ndarray
    digest: str
    modalities: dict[str, int]

    @property
    def total(self) -> int:
        """Clips in all."""
        return int(self.counts.sum())


class _Header(BaseModel):
    """What ``index.json`` must hold."""

    digest: str
    vocabularies: dict[str, list[str]]
    modalities: dict[str, int]
    splits: dict[str, SplitInfo]
    settings: dict[str, Any]


class Index:
    """What is known of a folder of shards without opening one.

    Args:
        store: folder of the tars.
        home: folder of the index files; the same, unless the store is read only.
        header: content of ``index.json``.
        table: content of ``shards.parquet``.
    """

    def __init__(self, store: Store, home: Store, header: Mapping[str, Any], table: pa.Table) -> None:
        self.store, self.home = store, home
        self.header, self.table = dict(header), table
        self.names: list[str] = table.column("name").to_pylist()
        self.clips = table.column("clips").to_numpy()
        self.bytes = table.column("bytes").to_numpy()

    @classmethod
    def load(cls, url: str, *, progress: Callable[[int, int], None] | None = None) -> Index:
        """Opens the index of a folder; a folder of tars without one is indexed on first sight.

        Args:
            url: the folder.
            progress: called with (shards done, shards in all) while tars are being indexed.

        Raises:
            UserError: when there are neither an index nor tars, the index is damaged or too new, or packing stopped.
        """
        store = open_store(url)
        if store.exists("index.json"):
            return cls.read(store, store)
        _refuse_unfinished(store)
        from crossgate.stream.foreign import index_foreign

        return index_foreign(url, progress=progress)

    @classmethod
    def read(cls, store: Store, home: Store) -> Index:
        """Opens an index that may lie elsewhere than its shards."""
        where = home.path("index.json")
        header = _header(home.read("index.json"), where)
        try:
            table = pq.ParquetFile(pa.BufferReader(home.read("shards.parquet"))).read(use_threads=False)
        except pa.ArrowInvalid as error:
            raise UserError("the shard table is damaged", where=home.path("shards.parquet")) from error
        if shards_digest(table) != header["digest"]:
            raise UserError("index and shard table do not belong together", where=where, cure=ANEW)
        pa.default_memory_pool().release_unused()
        return cls(store, home, header, table)

    @property
    def digest(self) -> str:
        """SHA-256 over the shard table."""
        return self.header["digest"]

    @property
    def vocabularies(self) -> dict[str, list[str]]:
        """Task -> class names; a label's number is its place here."""
        return self.header["vocabularies"]

    @property
    def modalities(self) -> dict[str, int]:
        """Modality -> clips that have it."""
        return self.header["modalities"]

    @property
    def settings(self) -> dict[str, Any]:
        """What the shards were packed with."""
        return self.header["settings"]

    @cached_property
    def splits(self) -> dict[str, SplitInfo]:
        """Split -> its size."""
        fields = ("shards", "clips", "groups")
        return {name: SplitInfo(*(info[field] for field in fields)) for name, info in self.header["splits"].items()}

    @cached_property
    def first(self) -> np.ndarray:
        """``(shards,)`` ordinal of each shard's first clip."""
        return np.cumsum(self.clips) - self.clips

    def sha256(self, shard: int) -> str:
        """Returns the digest of a shard's bytes; empty for tars that others wrote."""
        return self.table.column("sha256")[shard].as_py()

    def etag(self, shard: int) -> str:
        """Returns the store's tag of a shard's content; empty where it gave none, or the folder is a copy by now."""
        if self.header.get("etags_of") != self.store.url:
            return ""
        return self.table.column("etag")[shard].as_py()

    def summary(self) -> str:
        """Returns what is here in a few lines for a person."""
        splits = ", ".join(f"{name} {info.clips} in {info.groups} groups" for name, info in self.splits.items())
        modalities = ", ".join(f"{name} {clips}" for name, clips in self.modalities.items() if clips)
        labels = ", ".join(f"{task} ({len(classes)} classes)" for task, classes in self.vocabularies.items())
        size = f"{int(self.clips.sum())} clips in {len(self.names)} shards, {self.bytes.sum() / 1e6:.1f} MB"
        return "\n".join(
            [
                f"{size}: {self.store.url}",
                f"  splits      {splits}",
                f"  modalities  {modalities}",
                f"  labels      {labels or 'none'}",
                *(f"  note        {note}" for note in self._notes()),
            ]
        )

    def _notes(self) -> Iterator[str]:
        """What a run on this index will lack, said where it is made and not when a run ends."""
        if not self.splits.get("test"):
            yield "no test split: models will be trained and not measured (add a column `split`)"
        for task, classes in self.vocabularies.items():
            if len(classes) < 2:
                yield f"{task} has one class only ({classes[0]}): nothing to tell apart"

    def strays(self) -> list[str]:
        """Returns the tars beside an index of others' tars that came after it and are not used."""
        if not self.settings.get("indexed") or self.home is not self.store:
            return []
        return sorted(set(self.store.list(".tar")) - set(self.names))

    def missing(self, splits: Iterable[str]) -> list[str]:
        """Returns shards of some splits that are not there, by their names alone: nothing is read.

        A folder is listed. Where that is not allowed, not possible, or long, each split's first and last shard are
        looked for, so that some requests tell a folder that was moved or only copied in part.

        Raises:
            UserError: for a store that cannot be reached.
        """
        parts = [self.select([split]).shards.tolist() for split in splits]
        there = self._listed()
        if there is not None:
            return sorted(self.names[shard] for part in parts for shard in part if self.names[shard] not in there)
        ends = sorted({self.names[shard] for part in parts for shard in (part[0], part[-1])})
        return [name for name in ends if not self.store.exists(name)]

    def _listed(self) -> set[str] | None:
        """Returns what lies in the shards' folder, where one may know with few requests."""
        if self.store.url.startswith("http") or (len(self.names) > _LISTED and not self.store.local):
            return None
        try:
            return set(self.store.list(".tar"))
        except Unreachable:
            raise
        except UserError:  # who may read may not always list
            return None

    def class_counts(self, splits: Iterable[str]) -> dict[str, list[int]]:
        """Returns task -> clips of each class in the splits; reads every sidecar of them, one at a time."""
        counts = {task: np.zeros(len(classes), np.int64) for task, classes in self.vocabularies.items()}
        for shard in self.select(splits).shards.tolist():
            sidecar = self.sidecar(shard)
            for task, classes in self.vocabularies.items():
                ids = sidecar.label_ids(task, classes)
                counts[task] += np.bincount(ids[ids >= 0], minlength=len(classes))
        return {task: found.tolist() for task, found in counts.items()}

    def sidecar(self, shard: int) -> Sidecar:
        """Reads the clips of a shard (not kept: `reader.ClipReader` keeps the recent ones)."""
        return Sidecar.load(self.home, self.names[shard])

    def select(self, splits: Iterable[str], modalities: Iterable[str] = ()) -> Selection:
        """Returns the shards of some splits.

        Args:
            splits: names; all must exist and hold clips.
            modalities: each must be present in one clip at least; for training, since evaluation takes what there is.

        Raises:
            UserError: for an unknown or empty split, or a modality that no clip has.
        """
        wanted = tuple(dict.fromkeys(splits))
        valid = [name for name, info in self.splits.items() if info.clips]
        for name in wanted:
            if name not in valid:
                what = "has no clips" if name in self.splits else "does not exist"
                raise UserError(f"split {name!r} {what}", where=self.store.url, cure=nearest(name, valid))
        if not wanted:
            raise UserError("no split named", where=self.store.url, expected=f"some of {', '.join(valid)}")
        shards = np.flatnonzero(pc.is_in(self.table.column("split"), value_set=pa.array(wanted)).to_numpy())
        everything = len(shards) == len(self.names)
        table = self.table if everything else self.table.take(pa.array(shards))
        counts = {m: int(np.sum(table.column(f"clips_{m}").to_numpy())) for m in MODALITIES}
        for name in modalities:
            if not counts[name]:
                raise UserError(
                    f"no clip of {', '.join(wanted)} has modality {name!r}",
                    where=self.store.url,
                    expected=f"data.clip.modalities among {', '.join(m for m in counts if counts[m])}",
                )
        digest = self.digest if everything else shards_digest(table)
        return Selection(self, wanted, shards, self.clips[shards], digest, counts)


def _header(content: bytes, where: str) -> dict[str, Any]:
    """Returns the content of an ``index.json`` that has every key, each of its kind.

    Raises:
        UserError: naming the key that it lacks, or that holds something else; for another version.
    """
    try:
        header = json.loads(content)
    except ValueError as error:
        raise UserError(f"the index is damaged ({error})", where=where, cure=ANEW) from error
    version = header.get("version") if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise UserError("the index is damaged: key 'version' is no number", where=where, cure=ANEW)
    if version != VERSION:
        raise UserError(f"index version {version}", where=where, expected=str(VERSION), cure="upgrade crossgate")
    try:
        _Header.model_validate(header)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"the index is damaged: key '{key}': {first['msg']}", where=where, cure=ANEW) from None
    return header


def shards_digest(table: pa.Table) -> str:
    """Returns the SHA-256 over name, split, clips, bytes and digests of the shards, column by column."""
    digest = hashlib.sha256()
    for name in ("name", "split", "clips", "bytes", "sha256", "layout"):
        column = table.column(name)
        digest.update(f"{name}\0{len(column)}\0".encode())
        for first in range(0, len(column), _ROWS):  # a part at a time: as Python strings a column takes much memory
            values = column.slice(first, _ROWS).to_pylist()
            digest.update((b"\0" if first else b"") + "\0".join(map(str, values)).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def write_index(
    store: Store | str,
    entries: Sequence[ShardEntry] | Sequence[str],
    *,
    vocabularies: Mapping[str, Sequence[str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    home: Store | None = None,
) -> Index:
    """Writes ``shards.parquet`` and, last, ``index.json`` for finished shards.

    Args:
        store: folder of the shards, whose sidecars are there.
        entries: what `ShardWriter.entry` gave, or the names of finished shards.
        vocabularies: task -> class names; tasks that are not named get the sorted classes that occur.
        settings: of the packing, kept in the index for people to read.
        home: where index and sidecars are, if not beside the shards.

    Raises:
        UserError: for a shard that is not finished, a group in two splits, or a class outside its vocabulary.
    """
    store = open_store(store) if isinstance(store, str) else store
    home = home or store
    whole = sorted(_entries(store, entries), key=lambda entry: entry.name)
    found = survey(store, home, whole)
    table = shard_table(whole)
    header = {
        "version": VERSION,
        "digest": shards_digest(table),
        "shards": len(whole),
        "clips": sum(entry.clips for entry in whole),
        "bytes": sum(entry.bytes for entry in whole),
        "splits": _splits(whole, found.groups),
        "modalities": {m: sum(e.modalities.get(m, 0) for e in whole) for m in MODALITIES},
        "vocabularies": _vocabularies(found.classes, vocabularies or {}, store),
        "settings": dict(settings or {}),
    }
    if any(entry.etag for entry in whole):
        header["etags_of"] = store.url  # a copy elsewhere has the same bytes and other tags
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    home.put("shards.parquet", buffer.getvalue())
    home.put("index.json", json.dumps(header, indent=2, ensure_ascii=False).encode())
    return Index(store, home, header, table)


def _refuse_unfinished(store: Store) -> None:
    """A packer that was stopped left shards of ours without an index: they are not tars of others."""
    sidecars = store.list(sidecar_name(".tar"))
    entry = finished_shard(store, sidecars[0].removesuffix(sidecar_name(".tar")) + ".tar") if sidecars else None
    if entry is not None and entry.sha256:
        raise UserError(
            f"packing was not finished: {len(sidecars)} shards, no index",
            where=store.url,
            cure="run crossgate pack again",
        )


def _entries(store: Store, items: Sequence[ShardEntry] | Sequence[str]) -> list[ShardEntry]:
    names = [item for item in items if isinstance(item, str)]
    found = dict(zip(names, finished_shards(store, names)))
    entries = []
    for item in items:
        entry = found[item] if isinstance(item, str) else item
        if entry is None:
            raise UserError("this shard is not finished", where=store.path(str(item)), cure="pack again")
        entries.append(entry)
    return entries


def _splits(entries: Sequence[ShardEntry], groups: Mapping[str, int]) -> dict[str, dict[str, int]]:
    shards, clips = Counter[str](), Counter[str]()
    for entry in entries:
        shards[entry.split] += 1
        clips[entry.split] += entry.clips
    return {split: asdict(SplitInfo(shards[split], clips[split], groups[split])) for split in sorted(shards)}


def shard_table(entries: Sequence[ShardEntry]) -> pa.Table:
    """Returns a row a shard, as ``shards.parquet`` holds them."""
    rows = []
    for entry in entries:
        row = asdict(entry)
        counts = row.pop("modalities")
        rows.append(row | {f"clips_{m}": counts.get(m, 0) for m in MODALITIES})
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _vocabularies(
    seen: Mapping[str, set[str]], given: Mapping[str, Sequence[str]], store: Store
) -> dict[str, list[str]]:
    seen = {task: set[str]() for task in given} | dict(seen)
    for task, names in given.items():
        unknown = sorted(seen[task] - set(names))
        if unknown:
            raise UserError(
                f"label {unknown[0]!r} is not in the vocabulary of task {task!r}",
                where=store.url,
                cure=nearest(unknown[0], names),
            )
    return {task: list(given.get(task, sorted(names))) for task, names in sorted(seen.items())}
