"""Reading clips out of shards: only the members that are needed, by range."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from crossgate.config import CacheConfig
from crossgate.errors import UserError
from crossgate.modality import MODALITIES, ordered
from crossgate.stream.cache import RemoteShard, ShardCache, ShardChanged
from crossgate.stream.index import Index, Selection
from crossgate.stream.sidecar import ANEW, Sidecar
from crossgate.stream.storage import FileStat

MAX_CLIP_BYTES = 256 << 20
"""A clip whose members are longer than this together is not read."""

_SIDECAR_BYTES = 512 << 20
_FILES = 128
_LOCAL_GAP, _REMOTE_GAP = 4 << 10, 64 << 10  # bytes that cost less than another read
_THREADS = 16

Range = tuple[int, int, int]
"""Shard, start, end."""


@dataclass
class FetchedClip:
    """A clip as bytes, with what the index knows of it.

    Attributes:
        key, shard: its name and that of its shard.
        clip: its ordinal in the index; those of further corpora count on.
        group: 63-bit hash.
        labels: task -> class id or -1.
        degraded: ``(M,)`` of the modalities asked for.
        members: suffix -> bytes; None when `error` says why there are none.
        error: empty, or why the clip cannot be used.
    """

    key: str
    shard: str
    clip: int
    group: int
    labels: dict[str, int]
    degraded: np.ndarray
    members: dict[str, bytes] | None = None
    error: str = ""


class ClipReader:
    """Reads clips of one index, for one process; `fetch` may be called by several threads.

    Args:
        index: where they are.
        modalities: members of other modalities are not read.
        cache: where whole shards of a remote store are kept.
        vocabularies: by which labels are numbered (the index's own if None); a class that they lack is no label.
        first: ordinal of the index's first clip.
    """

    def __init__(
        self,
        index: Index,
        modalities: Sequence[str],
        cache: CacheConfig | None = None,
        *,
        vocabularies: Mapping[str, Sequence[str]] | None = None,
        first: int = 0,
    ) -> None:
        self.index, self.first = index, first
        self.vocabularies = index.vocabularies if vocabularies is None else vocabularies
        self.modalities = ordered(modalities)
        self.cache: ShardCache | None = None
        if cache is not None and cache.folder and not index.store.local:
            self.cache = ShardCache(cache.folder, int(cache.size_gb * 1e9))
        self._unread = MODALITIES.keys() - set(modalities)
        self._columns = [list(MODALITIES).index(m) for m in self.modalities]
        self._sidecars: OrderedDict[int, Sidecar] = OrderedDict()
        self._sidecar_bytes = 0
        self._files: OrderedDict[int, int] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._bytes = {"read_bytes": 0, "cache_bytes": 0}
        self._reported: dict[str, int] = {}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def close(self) -> None:
        """Ends the threads; what they read is lost."""
        if self.cache is not None:
            self.cache.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def traffic(self) -> dict[str, int]:
        """Returns what happened since the last call: bytes from the store, from the cache, into it, and retries."""
        totals = self._bytes | {
            "kept_bytes": self.cache.fetched if self.cache else 0,
            "retries": self.index.store.retries,
        }
        new = {name: value - self._reported.get(name, 0) for name, value in totals.items()}
        self._reported = totals
        return new

    def fetch(self, shards: np.ndarray, rows: np.ndarray) -> list[FetchedClip]:
        """Returns clips, in the order asked for.

        Args:
            shards: ``(n,)`` numbers of shards in the index.
            rows: ``(n,)`` numbers of clips in them.

        Raises:
            UserError: when a shard cannot be read, or is not the one that was indexed.
        """
        clips: list[FetchedClip] = []
        ranges: list[Range] = []
        owners = []
        gap = _LOCAL_GAP if self.index.store.local else _REMOTE_GAP
        with self._lock:
            self._look_ahead(shards)
            described = [self._describe(*place) for place in zip(shards.tolist(), rows.tolist())]
        for shard, (clip, members) in zip(shards.tolist(), described):
            if sum(size for _, size in members.values()) > MAX_CLIP_BYTES:
                clip.error = f"longer than {MAX_CLIP_BYTES >> 20} MiB"
            else:
                clip.members = {}
                for start, end, parts in _runs(members, gap):
                    ranges.append((shard, start, end))
                    owners.append((clip.members, start, parts))
            clips.append(clip)
        for (into, start, parts), data in zip(owners, self._read(ranges)):
            into.update({suffix: data[o - start : o - start + size] for suffix, o, size in parts})
        return clips

    def sidecar(self, shard: int) -> Sidecar:
        """Returns the columns of a shard, from the recently used ones or from the store."""
        if shard in self._sidecars:
            self._sidecars.move_to_end(shard)
            return self._sidecars[shard]
        return self._keep(shard, self.index.sidecar(shard))

    def _look_ahead(self, shards: np.ndarray) -> None:
        """Reads the sidecars that are missing, several at a time where each costs a way to the store and back."""
        missing = [shard for shard in np.unique(shards).tolist() if shard not in self._sidecars]
        if len(missing) > 1 and not self.index.home.local:
            for shard, sidecar in zip(missing, self._threads().map(self.index.sidecar, missing)):
                self._keep(shard, sidecar)

    def _keep(self, shard: int, sidecar: Sidecar) -> Sidecar:
        if len(sidecar) != self.index.clips[shard]:
            raise UserError(
                f"the sidecar names {len(sidecar)} clips, the index {self.index.clips[shard]}",
                where=self.index.store.path(self.index.names[shard]),
                cure=ANEW,
            )
        self._sidecars[shard] = sidecar
        self._sidecar_bytes += sidecar.nbytes
        while self._sidecar_bytes > _SIDECAR_BYTES and len(self._sidecars) > 1:
            self._sidecar_bytes -= self._sidecars.popitem(last=False)[1].nbytes
        return sidecar

    def _describe(self, shard: int, row: int) -> tuple[FetchedClip, dict[str, tuple[int, int]]]:
        sidecar = self.sidecar(shard)
        labels = {t: int(sidecar.label_ids(t, words)[row]) for t, words in self.vocabularies.items()}
        clip = FetchedClip(
            key=sidecar.key(row),
            shard=self.index.names[shard],
            clip=self.first + int(self.index.first[shard]) + row,
            group=int(sidecar.group[row]),
            labels=labels,
            degraded=sidecar.degraded[row, self._columns],
        )
        members = sidecar.members(row)
        return clip, {s: place for s, place in members.items() if s.split(".")[0] not in self._unread}

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def _read(self, ranges: list[Range]) -> list[bytes]:
        if self.index.store.local:
            with self._lock:  # beside a remote corpus several threads come here, and opening one file closes another
                self._bytes["read_bytes"] += sum(end - start for _, start, end in ranges)
                return [self._pread(*item) for item in ranges]
        found = self._read_cached(ranges) if self.cache else {}
        missing = [item for item in ranges if item not in found]
        self._check({shard for shard, _, _ in missing})
        got = self.index.store.read_ranges([(self.index.names[s], start, end) for s, start, end in missing])
        self._bytes["read_bytes"] += sum(map(len, got))
        found |= zip(missing, got)
        return [found[item] for item in ranges]

    def _read_cached(self, ranges: list[Range]) -> dict[Range, bytes]:
        """Returns what the cache has, and asks it for the shards that it has not."""
        assert self.cache is not None
        found: dict[Range, bytes] = {}
        by_shard: dict[int, list[Range]] = defaultdict(list)
        for item in ranges:
            by_shard[item[0]].append(item)
        for shard, items in by_shard.items():
            remote = self._remote(shard)
            got = self.cache.read(remote, [(start, end) for _, start, end in items])
            if got is None:
                self._check([shard])
                self.cache.want(remote)
            else:
                found |= zip(items, got)
        self._bytes["cache_bytes"] += sum(map(len, found.values()))
        return found

    def _remote(self, shard: int) -> RemoteShard:
        index = self.index
        identity = index.etag(shard) or index.table.column("layout")[shard].as_py()
        return RemoteShard(index.store, index.names[shard], int(index.bytes[shard]), index.sha256(shard), identity)

    def _check(self, shards: Iterable[int]) -> None:
        """Compares length and tag of shards that this process meets for the first time."""
        new = [shard for shard in shards if shard not in self._checked]
        for shard, found in zip(new, self._threads().map(self._stat, new)):
            self._compare(shard, found.size)
            known = self.index.etag(shard)
            if known and found.etag and known != found.etag:
                raise ShardChanged(self.index.store.path(self.index.names[shard]), f"ETag {found.etag}, not {known}")
            self._checked.add(shard)

    def _stat(self, shard: int) -> FileStat:
        """Asks twice before a length counts as changed: one answer that lost its header must not end a run."""
        name = self.index.names[shard]
        found = self.index.store.stat(name)
        return found if found.size == self.index.bytes[shard] else self.index.store.stat(name)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "clip-reader")
        return self._pool

    def _pread(self, shard: int, start: int, end: int) -> bytes:
        try:
            data = os.pread(self._file(shard), end - start, start)
        except OSError as error:
            raise UserError(
                f"cannot be read ({error.strerror})", where=self.index.store.path(self.index.names[shard])
            ) from error
        if len(data) != end - start:
            self._compare(shard, start + len(data))
        return data

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        file = os.open(self.index.store.path(self.index.names[shard]), os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = file
        self._compare(shard, os.fstat(file).st_size)
        if len(self._files) > _FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _compare(self, shard: int, size: int) -> None:
        if size != self.index.bytes[shard]:
            where = self.index.store.path(self.index.names[shard])
            raise ShardChanged(where, f"{size} bytes instead of {self.index.bytes[shard]}")


def read_clips(index: Index, selection: Selection, places: np.ndarray) -> list[dict[str, bytes]]:
    """Returns the members (suffix -> bytes, of all modalities) of some clips of a selection.

    Args:
        index: of the shards.
        selection: of that index.
        places: ``(n,)`` numbers of clips, counted through the selection.

    Raises:
        UserError: when a shard cannot be read, or a clip is too long to be read.
    """
    ends = np.cumsum(selection.counts)
    shard = np.searchsorted(ends, places, side="right")
    rows = places - (ends[shard] - selection.counts[shard])
    clips = ClipReader(index, tuple(MODALITIES)).fetch(selection.shards[shard], rows)
    for clip in clips:
        if clip.error:
            raise UserError(f"clip {clip.key!r} cannot be read: {clip.error}", where=clip.shard)
    return [clip.members or {} for clip in clips]


def _runs(members: dict[str, tuple[int, int]], gap: int) -> list[tuple[int, int, list[tuple[str, int, int]]]]:
    """Joins members that lie close together: ``(start, end, [(suffix, offset, size)])``."""
    runs: list[tuple[int, int, list[tuple[str, int, int]]]] = []
    for suffix, (offset, size) in sorted(members.items(), key=lambda item: item[1]):
        if runs and offset - runs[-1][1] <= gap:
            start, end, parts = runs[-1]
            runs[-1] = (start, max(end, offset + size), [*parts, (suffix, offset, size)])
        else:
            runs.append((offset, offset + size, [(suffix, offset, size)]))
    return runs
