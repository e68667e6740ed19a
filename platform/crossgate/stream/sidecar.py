"""One parquet file beside each shard: a row a clip, with what it is and where its members lie in the tar."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossgate.errors import UserError
from crossgate.modality import MODALITIES
from crossgate.stream.storage import Store

_META = b"crossgate"
ANEW = "pack it again, or delete index.json, shards.parquet and *.idx.parquet beside tars of others: they are made anew"
"""The cure for an index that is not its shards'."""


@dataclass(frozen=True)
class ClipRecord:
    """One clip of a shard.

    Attributes:
        key: its name, unique in the index.
        group: name of the source that it was cut from.
        modalities: those it has.
        labels: task -> class name.
        degraded: modality -> severity in 0..1, where it is known.
        members: suffix -> ``(offset, size)`` of the bytes in the tar.
    """

    key: str
    group: str
    modalities: tuple[str, ...]
    members: Mapping[str, tuple[int, int]]
    labels: Mapping[str, str] = field(default_factory=dict)
    degraded: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardEntry:
    """What the index knows of a whole shard.

    Attributes:
        name: file name of the tar.
        split: the one split that all its clips belong to.
        clips: how many.
        bytes: length of the tar.
        sha256: of the tar; empty for shards that others wrote, of which only the headers were read.
        layout: SHA-256 over names, offsets and sizes of the members.
        modalities: modality -> clips that have it.
        settings: digest of the settings that made the shard, empty if unknown.
        etag: the store's tag of the tar's content, empty where it gives none.
    """

    name: str
    split: str
    clips: int
    bytes: int
    sha256: str
    layout: str
    modalities: dict[str, int]
    settings: str = ""
    etag: str = ""


def group_hash(name: str) -> int:
    """Returns the 63-bit number that stands for a group in tensors."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def layout_digest(records: Sequence[ClipRecord]) -> str:
    """Returns the SHA-256 over every member's key, suffix, offset and size."""
    digest = hashlib.sha256()
    for record in records:
        for suffix, (offset, size) in record.members.items():
            digest.update(f"{record.key}\0{suffix}\0{offset}\0{size}\n".encode())
    return digest.hexdigest()


def sidecar_name(shard: str) -> str:
    """Returns the name of a shard's sidecar: ``a.tar`` has ``a.idx.parquet``."""
    return f"{shard.removesuffix('.tar')}.idx.parquet"


def count_modalities(records: Sequence[ClipRecord]) -> dict[str, int]:
    """Returns for each modality how many clips have it."""
    return {name: sum(name in record.modalities for record in records) for name in MODALITIES}


def write_sidecar(store: Store, entry: ShardEntry, records: Sequence[ClipRecord]) -> None:
    """Writes the sidecar, atomically; with it the shard counts as finished."""
    tasks = sorted({task for record in records for task in record.labels})
    columns: dict[str, pa.Array] = {
        "key": pa.array([r.key for r in records], pa.string()),
        "group": pa.array([r.group for r in records], pa.string()),
        "group_hash": pa.array([group_hash(r.group) for r in records], pa.int64()),
        "suffix": pa.array([list(r.members) for r in records], pa.list_(pa.string())),
        "offset": pa.array([[o for o, _ in r.members.values()] for r in records], pa.list_(pa.int64())),
        "size": pa.array([[s for _, s in r.members.values()] for r in records], pa.list_(pa.int64())),
    }
    for name in MODALITIES:
        columns[f"present_{name}"] = pa.array([name in r.modalities for r in records], pa.bool_())
        columns[f"degraded_{name}"] = pa.array([r.degraded.get(name) for r in records], pa.float32())
    for task in tasks:
        columns[f"label_{task}"] = pa.array([r.labels.get(task) for r in records], pa.string())
    table = pa.table(columns).replace_schema_metadata({_META: json.dumps(asdict(entry), sort_keys=True)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    store.put(sidecar_name(entry.name), buffer.getvalue())


def finished_shard(store: Store, name: str) -> ShardEntry | None:
    """Returns the entry of a shard that is whole (its sidecar is there and the tar has the length written in it).

    A packer that was killed keeps such shards when the `settings` agree, and writes the others anew.
    """
    if not store.exists(sidecar_name(name)) or not store.exists(name):
        return None
    try:
        metadata = pq.read_schema(io.BytesIO(store.read(sidecar_name(name)))).metadata
        entry = ShardEntry(**json.loads(metadata[_META]))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    found = store.stat(name)
    return replace(entry, etag=found.etag) if (entry.name, entry.bytes) == (name, found.size) else None


class Sidecar:
    """A shard's clips as columns. ``M`` runs over all of `MODALITIES`.

    Args:
        table: as `write_sidecar` makes it.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        suffix = table.column("suffix").combine_chunks()
        self._starts = suffix.offsets.to_numpy()
        self._suffix = suffix.flatten()
        self._offset = table.column("offset").combine_chunks().flatten().to_numpy()
        self._size = table.column("size").combine_chunks().flatten().to_numpy()
        self._ids: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._table.num_rows

    @classmethod
    def load(cls, store: Store, shard: str) -> Sidecar:
        """Reads the sidecar of a shard.

        Raises:
            UserError: when it is missing or damaged.
        """
        name = sidecar_name(shard)
        try:
            return cls(pq.ParquetFile(pa.BufferReader(store.read(name))).read(use_threads=False))
        except (pa.ArrowInvalid, KeyError) as error:
            raise UserError(f"the shard's sidecar is damaged ({error})", where=store.path(name), cure=ANEW) from error

    @cached_property
    def group(self) -> np.ndarray:
        """``(clips,)`` int64."""
        return self._table.column("group_hash").to_numpy()

    @cached_property
    def present(self) -> np.ndarray:
        """``(clips, M)`` bool."""
        return np.stack([self._column(f"present_{m}", len(self), False) for m in MODALITIES], axis=1)

    @cached_property
    def degraded(self) -> np.ndarray:
        """``(clips, M)`` float32, NaN where nothing is known."""
        return np.stack([self._column(f"degraded_{m}", len(self), np.nan) for m in MODALITIES], axis=1)

    @property
    def nbytes(self) -> int:
        """Memory that the columns take."""
        return self._table.nbytes

    @property
    def tasks(self) -> list[str]:
        """Tasks that some clip of the shard has a label of."""
        return [name.removeprefix("label_") for name in self._table.column_names if name.startswith("label_")]

    def key(self, row: int) -> str:
        """Returns the name of one clip."""
        return self._table.column("key")[row].as_py()

    def group_name(self, row: int) -> str:
        """Returns the name of the group of one clip."""
        return self._table.column("group")[row].as_py()

    def classes(self, task: str) -> set[str]:
        """Returns the class names that occur."""
        return set(self._table.column(f"label_{task}").drop_null().unique().to_pylist())

    def label_ids(self, task: str, vocabulary: Sequence[str]) -> np.ndarray:
        """Returns ``(clips,)`` int64 places in the vocabulary, -1 where there is no such label."""
        if task not in self._ids:
            ids = np.full(len(self), -1, np.int64)
            if f"label_{task}" in self._table.column_names:
                found = pc.index_in(self._table.column(f"label_{task}"), value_set=pa.array(vocabulary, pa.string()))
                ids = found.fill_null(-1).to_numpy().astype(np.int64)
            self._ids[task] = ids
        return self._ids[task]

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Returns suffix -> ``(offset, size)`` of one clip."""
        a, b = self._starts[row], self._starts[row + 1]
        return {self._suffix[i].as_py(): (int(self._offset[i]), int(self._size[i])) for i in range(a, b)}

    def record(self, row: int) -> ClipRecord:
        """Returns one clip as it was written."""
        modalities = tuple(m for m, there in zip(MODALITIES, self.present[row]) if there)
        degraded = {m: float(x) for m, x in zip(MODALITIES, self.degraded[row]) if not np.isnan(x)}
        labels = {task: self._table.column(f"label_{task}")[row].as_py() for task in self.tasks}
        return ClipRecord(
            key=self.key(row),
            group=self.group_name(row),
            modalities=modalities,
            members=self.members(row),
            labels={task: name for task, name in labels.items() if name is not None},
            degraded=degraded,
        )

    def _column(self, name: str, clips: int, default: float | bool) -> np.ndarray:
        if name not in self._table.column_names:  # written before this modality existed
            return np.full(clips, default)
        return np.asarray(self._table.column(name).to_numpy(zero_copy_only=False))
