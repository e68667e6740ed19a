"""Writing a shard: a plain WebDataset tar, the same bytes for the same clips, visible only when whole."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from crossgate.errors import UserError
from crossgate.modality import MODALITIES
from crossgate.stream.sidecar import (
    ClipRecord,
    ShardEntry,
    count_modalities,
    finished_shard,
    layout_digest,
    write_sidecar,
)
from crossgate.stream.storage import Store

__all__ = ["ShardEntry", "ShardWriter", "finished_shard"]

_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BLOCK = 512


class ShardWriter(AbstractContextManager):
    """Writes one shard and its sidecar; use it in a ``with`` block.

    Leaving the block closes the shard: `entry` is then what the index wants to know. An exception inside the block,
    or a kill, leaves nothing visible. Clips keep the order in which they were added.

    Args:
        store: folder of the shard.
        name: file name, ``SPLIT-000000.tar`` by custom.
        split: the one split of all its clips.
        settings: digest of the settings that made the clips, so that a restarted packer knows its own shards.
    """

    def __init__(self, store: Store, name: str, *, split: str, settings: str = "") -> None:
        if not name.endswith(".tar"):
            raise UserError("a shard's name ends in .tar", where=name)
        self.store, self.name, self.split, self.settings = store, name, split, settings
        self.entry: ShardEntry | None = None
        self._records: list[ClipRecord] = []
        self._keys: set[str] = set()

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._tar.offset

    @property
    def clips(self) -> int:
        """Clips added so far."""
        return len(self._records)

    def __enter__(self) -> ShardWriter:
        self._writing = self.store.writing(self.name)
        self._file = _Hashed(self._writing.__enter__())
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]
        return self

    def add(self, key: str, members: Mapping[str, bytes], record: Mapping[str, Any]) -> None:
        """Adds a clip.

        Args:
            key: ``[A-Za-z0-9_-]+``; WebDataset would take what follows a dot for part of the suffix.
            members: suffix -> bytes, without ``json``. The modalities are those that the suffixes begin with.
            record: what becomes ``KEY.json``, with ``key`` and ``split`` filled in; of it the index keeps ``group``
                (default: the key), ``labels`` (task -> class name) and ``degraded`` (modality -> severity).

        Raises:
            UserError: for a bad or repeated key, or a split other than the shard's.
        """
        if not _KEY.fullmatch(key):
            raise UserError(f"clip key {key!r} is not usable", where=self.name, expected="letters, digits, _ and -")
        if key in self._keys:
            raise UserError(f"clip key {key!r} appears twice", where=self.name)
        if record.get("split", self.split) != self.split:
            raise UserError(f"clip {key!r} is of split {record['split']!r}", where=self.name, expected=self.split)
        if "json" in members:
            raise ValueError("the json member is made from the record")
        text = json.dumps({"key": key, "split": self.split, **record}, sort_keys=True, ensure_ascii=False).encode()
        places = {suffix: self._add(f"{key}.{suffix}", data) for suffix, data in {"json": text, **members}.items()}
        self._keys.add(key)
        self._records.append(
            ClipRecord(
                key=key,
                group=str(record.get("group", key)),
                modalities=tuple(m for m in MODALITIES if any(s.split(".")[0] == m for s in members)),
                members=places,
                labels=dict(record.get("labels", {})),
                degraded=dict(record.get("degraded", {})),
            )
        )

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            try:
                self._tar.close()
            except BaseException as failure:
                self._writing.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._writing.__exit__(kind, error, trace)
        if kind is None:
            self.entry = ShardEntry(
                name=self.name,
                split=self.split,
                clips=len(self._records),
                bytes=self._file.length,
                sha256=self._file.digest.hexdigest(),
                layout=layout_digest(self._records),
                modalities=count_modalities(self._records),
                settings=self.settings,
                etag=self.store.stat(self.name).etag,
            )
            write_sidecar(self.store, self.entry, self._records)

    def _add(self, name: str, data: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)  # mtime, owner and mode are constants: the same clips give the same bytes
        info.size = len(data)
        self._tar.addfile(info)
        offset = self._tar.offset
        self._file.write(data)
        padding = -len(data) % _BLOCK
        self._file.write(bytes(padding))
        self._tar.offset += len(data) + padding
        return offset, len(data)


class _Hashed:
    """A file that is written through, with its length and SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.length, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.length += len(data)
        self.digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.length
