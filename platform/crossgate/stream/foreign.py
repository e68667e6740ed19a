"""Tars that others wrote (``KEY.mp4`` and ``KEY.json``, as video2dataset makes them): indexed without rewriting a byte.

Only tar headers and the small JSON members are read. What the sound track of an ``mp4`` holds is found out when the
clip is decoded, so in such an index `rgb`, `flow` and `audio` mean "may be there".
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from crossgate.environment import cache_dir
from crossgate.errors import UserError
from crossgate.modality import MODALITIES
from crossgate.stream.index import Index, write_index
from crossgate.stream.sidecar import ClipRecord, ShardEntry, count_modalities, layout_digest, write_sidecar
from crossgate.stream.storage import Store, open_store

_MEMBER = re.compile(rf"(?P<key>.+?)\.(?P<suffix>(?:{'|'.join(MODALITIES)})\.[a-z0-9]+|json|mp4)")
_PACKED = re.compile(rf"{_MEMBER.pattern}\.(?:gz|bz2|xz|zst)")
_KEPT = ("split", "group", "url", "labels", "degraded")
_IN_MP4 = ("rgb", "flow", "audio")
_MAX_JSON = 1 << 20
_THREADS = 8
_BLOCK = 512
_AT_ONCE = 32 << 10
"""Bytes asked for at a time while a remote tar is scanned: a few headers and a JSON member, and little of a video."""

_log = logging.getLogger(__name__)


def index_foreign(url: str, *, progress: Callable[[int, int], None] | None = None) -> Index:
    """Indexes a folder of plain tars; the index lies beside them, or in the cache where that is read only.

    A clip's split is the ``split`` of its JSON (default ``train``), its group the ``group`` or ``url`` there (default:
    the key), its labels the ``labels`` there (task -> class name).

    Args:
        url: folder of the tars.
        progress: called with (shards done, shards in all).

    Raises:
        UserError: naming the tar and the reason, for one that is compressed or has such a member, is cut off, of two
            splits or with two members of one name; or when there are no clips.
    """
    store = open_store(url)
    names = store.list(".tar")
    _refuse_compressed(store, names)
    home = store if store.writable() else Store(cache_dir() / "indexes" / hashlib.sha256(url.encode()).hexdigest()[:16])
    kept = _still_right(store, home, names)
    if kept is not None:
        return kept
    entries: list[ShardEntry] = []
    with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
        for entry in pool.map(lambda name: _index_tar(store, home, name), names):
            entries.append(entry)
            if progress:
                progress(len(entries), len(names))
    if not any(entry.clips for entry in entries):
        raise UserError("no clips in these tars", where=store.url, expected="members KEY.mp4 or KEY.rgb.mp4")
    return write_index(store, entries, home=home, settings={"indexed": "tars of others"})


def scan_tar(file: BinaryIO, where: str) -> list[tuple[ClipRecord, str]]:
    """Reads the headers of a tar, and its JSON members.

    Args:
        file: seekable.
        where: its name, for messages.

    Returns:
        clips in the order of their first members, each with its split.

    Raises:
        UserError: when the tar is no whole, plain tar.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    texts: dict[str, dict[str, Any] | UserError] = {}
    end = 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                if info.isfile() and _PACKED.fullmatch(info.name):
                    raise UserError(f"member {info.name!r} is compressed", where=where, cure="pack it as it is")
                match = _MEMBER.fullmatch(info.name)
                if match and info.isfile():
                    clip = members.setdefault(match["key"], {})
                    if match["suffix"] in clip:
                        raise UserError(f"two members are named {info.name!r}", where=where)
                    clip[match["suffix"]] = (info.offset_data, info.size)
                    if match["suffix"] == "json":  # now, while its bytes are at hand
                        texts[match["key"]] = _json(file, match["key"], info, where)
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
    except tarfile.TarError as error:
        raise UserError(f"no whole tar ({error})", where=where, cure="fetch or pack it again") from error
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise UserError("the tar is cut off or damaged", where=where, expected="an end mark after the last member")
    found = []
    for key, places in members.items():
        if places.keys() - {"json"}:
            text = texts.get(key, {})
            if isinstance(text, UserError):  # one that describes nothing may be broken
                raise text
            found.append((_record(key, places, text), str(text.get("split", "train"))))
    return found


def _index_tar(store: Store, home: Store, name: str) -> ShardEntry:
    try:
        with store.open(name, _AT_ONCE) as file:
            found = scan_tar(file, store.path(name))
    except OSError as error:  # of a disk: a remote store's failures are explained by it
        raise UserError(f"cannot be read ({error.strerror or error})", where=store.path(name)) from error
    splits = sorted({split for _, split in found})
    if len(splits) > 1:
        raise UserError(
            f"clips of splits {splits[0]!r} and {splits[1]!r} in one tar",
            where=store.path(name),
            expected="one split a tar",
        )
    records = [record for record, _ in found]
    about = store.stat(name)
    entry = ShardEntry(
        name=name,
        split=splits[0] if splits else "train",
        clips=len(records),
        bytes=about.size,
        sha256="",
        layout=layout_digest(records),
        modalities=count_modalities(records),
        etag=about.etag,
    )
    write_sidecar(home, entry, records)
    return entry


def _record(key: str, places: dict[str, tuple[int, int]], text: dict[str, Any]) -> ClipRecord:
    heads = {suffix.split(".")[0] for suffix in places}
    if "mp4" in places:
        heads.update(_IN_MP4)
    return ClipRecord(
        key=key,
        group=str(text.get("group") or text.get("url") or key),
        modalities=tuple(m for m in MODALITIES if m in heads),
        members=places,
        labels={str(task): str(name) for task, name in _mapping(text, "labels").items()},
        degraded={m: float(x) for m, x in _mapping(text, "degraded").items() if m in MODALITIES},
    )


def _mapping(text: dict[str, Any], name: str) -> dict[str, Any]:
    found = text.get(name)
    return found if isinstance(found, dict) else {}


def _json(file: BinaryIO, key: str, info: tarfile.TarInfo, where: str) -> dict[str, Any] | UserError:
    """Returns what the index keeps of a JSON member, or why that cannot be told."""
    try:
        if info.size > _MAX_JSON:
            raise ValueError(f"{info.size} bytes")
        file.seek(info.offset_data)
        text = json.loads(file.read(info.size))
        if not isinstance(text, dict):
            raise ValueError("no mapping")
    except ValueError as error:
        return UserError(f"{key}.json cannot be used ({error})", where=where, cure="mend or remove the member")
    return {name: text[name] for name in _KEPT if name in text}


def _refuse_compressed(store: Store, names: list[str]) -> None:
    packed = [name for name in store.list() if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"))]
    if packed:
        raise UserError(
            "compressed tars cannot be read from the middle", where=store.path(packed[0]), cure="decompress them first"
        )
    if not names:
        raise UserError("neither an index nor tars here", where=store.url, cure="check the URL, or pack into it first")


def _still_right(store: Store, home: Store, names: list[str]) -> Index | None:
    """An index kept elsewhere, unless the tars are others by now."""
    if home is store or not home.exists("index.json"):
        return None
    index = Index.read(store, home)
    if index.names != names:
        return None
    with ThreadPoolExecutor(_THREADS) as pool:
        return index if list(pool.map(store.size, names)) == index.bytes.tolist() else None
