"""Files in a folder that is named by a URL: a local path, ``s3://bucket/prefix`` or ``http(s)://``, through fsspec.

Credentials, profiles and endpoints are those that s3fs finds by itself; none passes through here or into a log.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from crossgate.config.base import NO_CREDENTIALS, has_credentials
from crossgate.errors import NO_MORE, UserError
from crossgate.stream.failures import explain, from_store, transient

log = logging.getLogger("crossgate.stream")

DEADLINE = 60.0
"""Seconds after which a request that keeps failing is given up, from its first failure on or since it last got on."""

PATIENCE = 10.0
"""Seconds without a byte after which a request counts as failed."""
TELL = 5.0
"""Seconds after which a request that fails and is tried again is told, at most once a deadline."""
PIECE = 4 << 20
"""Bytes asked for in one request at most: a body that breaks off is fetched again from its last whole piece on."""
PART = 16 << 20
"""Bytes sent in one request at most, up to 160 GB a file: a part that breaks off is sent again, and no other."""
SLOWEST = 128 << 10
"""Bytes a second below which what is sent counts as stuck: s3fs waits for ever for a server's leave to send a body."""

PROBE = ".crossgate-probe"
"""Name of an empty file that is added and removed to see whether a folder can be written."""

_SCHEMES = ("file", "s3", "http", "https")
_CONNECTIONS = 32
_SIGNED_FOR = 3600  # seconds
_SIGNED_KEPT = 10_000
_SIGNED_TRIES = 8  # in a row where all that failed so came without, after which a store is taken to refuse them
_NOT_SIGNED = OSError("not asked for by a signed URL")
_MOST_PARTS = 10_000  # S3's own bound
_PARTS_AT_ONCE = 4
_PARTIAL = ".partial-"

T = TypeVar("T")


class FileStat(NamedTuple):
    """Length in bytes of a file, and the tag that a store gives its content (empty where it gives none)."""

    size: int
    etag: str


class FileDetails(NamedTuple):
    """Length in bytes of a file, and when it was written (seconds since 1970, NaN where a store does not tell)."""

    size: int
    modified: float


class Store:
    """One folder of files. Cheap to pickle: another process opens its own connection.

    Args:
        url: local path, ``file://``, ``s3://`` or ``http(s)://`` URL of the folder.

    Raises:
        UserError: for any other kind of URL (`pipe:` and chained URLs among them), or one with credentials in it.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        text = os.fspath(url)
        scheme = text.split("://", 1)[0] if "://" in text else "file"
        if scheme not in _SCHEMES or "::" in text or text.startswith("pipe:"):
            where = scheme if has_credentials(text) else text
            raise UserError(
                "storage of this kind is not read", where=where, expected="a path, or an s3, http or https URL"
            )
        if scheme != "file" and has_credentials(text):
            raise UserError("holds credentials", where=f"{scheme}:// URL", expected=NO_CREDENTIALS)
        self.local = scheme == "file"
        self.url = os.path.abspath(text.removeprefix("file://")) if self.local else text.rstrip("/")
        self.retries = 0
        """Requests repeated by this process so far."""
        self._told = -math.inf
        self._fs: Any = None
        self._signed = SignedReader(self) if scheme == "s3" else None

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self):
        return Store, (self.url,)

    @property
    def fs(self) -> Any:
        """The fsspec file system, opened on first use in each process; it lists anew each time: others write too."""
        if self._fs is None:
            scheme = "file" if self.local else self.url.split("://", 1)[0]
            self._fs = fsspec.filesystem(scheme, use_listings_cache=False, **_options(scheme))
            self._fs.retries = 1  # what fails is tried again here, under one deadline, not in three layers at once
        return self._fs

    def path(self, name: str) -> str:
        """Returns the full path or URL of a file of this folder."""
        return f"{self.url}/{name}"

    # ---- reading -----------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """Returns a whole file."""
        if self.local:
            with self._explained(name):
                return Path(self.path(name)).read_bytes()
        return self._retried(name, lambda: self.fs.cat_file(self.path(name)))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Returns the bytes ``start <= i < end``; fewer bytes than that count as a broken transfer."""
        return self.read_ranges([(name, start, end)])[0]

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Returns several ranges ``(name, start, end)``, fetched at the same time where the store is remote.

        A range that breaks off goes on from its last whole `PIECE`; ranges that came are not asked for again.
        """
        pieces = [
            (i, at, min(at + PIECE, end)) for i, (_, start, end) in enumerate(ranges) for at in range(start, end, PIECE)
        ]
        found: list[bytes | None] = [None] * len(pieces)
        blamed = ranges[0][0] if ranges else ""

        def fetch() -> None:
            nonlocal blamed
            todo = [number for number, data in enumerate(found) if data is None]
            owners, starts, ends = zip(*(pieces[number] for number in todo))
            names = [self.path(ranges[i][0]) for i in owners]
            failures: dict[str, Exception] = {}
            read = self._signed.read if self._signed else partial(self.fs.cat_ranges, on_error="return")
            got = read(names, list(starts), list(ends))
            for number, data in zip(todo, got):
                i, start, end = pieces[number]
                if isinstance(data, Exception):
                    failures[ranges[i][0]] = data
                elif len(data) != end - start:
                    failures[ranges[i][0]] = OSError(f"{len(data)} of {end - start} bytes came")
                else:
                    found[number] = bytes(data)
            if failures:
                blamed = min(failures, key=lambda name: transient(failures[name]))  # no other try mends the first
                raise failures[blamed]

        if pieces:
            with self._explained(lambda: blamed):
                self._attempt(fetch, lambda: sum(data is not None for data in found))
        whole: list[list[bytes]] = [[] for _ in ranges]
        for (i, _, _), data in zip(pieces, found):
            whole[i].append(data or b"")
        return [parts[0] if len(parts) == 1 else b"".join(parts) for parts in whole]

    def open(self, name: str, block: int = PIECE) -> BinaryIO:
        """Opens a file for sequential reading with seeks; a remote one is asked for so many bytes at a time."""
        if not self.local:
            return io.BufferedReader(_RemoteFile(self, name), block)
        with self._explained(name):
            return open(self.path(name), "rb")

    def size(self, name: str) -> int:
        """Returns a file's length in bytes."""
        return self.stat(name).size

    def stat(self, name: str) -> FileStat:
        """Returns a file's length and the store's tag of its content."""
        with self._explained(name):
            if self.local:
                return FileStat(os.path.getsize(self.path(name)), "")
            info = self._retried(name, lambda: self.fs.info(self.path(name)))
            if not info["size"]:  # one answer that lost its header must not make a shard an empty file
                info = self._retried(name, lambda: self.fs.info(self.path(name)))
            return FileStat(int(info["size"]), str(info.get("ETag") or "").strip('"'))

    def exists(self, name: str) -> bool:
        """Says whether the folder has such a file; a store that cannot be reached is an error, not a no."""
        if self.local:
            return os.path.isfile(self.path(name))
        try:
            self._attempt(lambda: self.fs.info(self.path(name)))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise explain(error, self.path(name)) from error
        return True

    def list(self, suffix: str = "") -> list[str]:
        """Returns the sorted names of the folder's own files, hidden ones left out."""
        with self._explained(""):
            if self.local:
                names = [entry.name for entry in os.scandir(self.url) if entry.is_file()]
            else:
                found = self._retried("", lambda: self.fs.ls(self.url, detail=True))
                names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "file"]
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))

    def details(self) -> dict[str, FileDetails]:
        """Returns name -> length and time of the folder's own files, hidden ones left out, as a listing tells them."""
        with self._explained(""):
            if self.local:
                about = {entry.name: entry.stat() for entry in os.scandir(self.url) if entry.is_file()}
                found = {name: FileDetails(stat.st_size, stat.st_mtime) for name, stat in about.items()}
            else:
                found = {
                    entry["name"].rstrip("/").rsplit("/", 1)[-1]: FileDetails(entry["size"] or 0, _written(entry))
                    for entry in self._retried("", lambda: self.fs.ls(self.url, detail=True))
                    if entry["type"] == "file"
                }
        return {name: one for name, one in sorted(found.items()) if not name.startswith(".")}

    # ---- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Gives a local file to write; leaving the block makes it appear under its name, whole, or not at all."""
        self._refuse_http(name)
        folder = self.url if self.local else tempfile.gettempdir()
        beside = os.path.join(folder, f".{name}{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")
        with self._explained(name):
            os.makedirs(folder, exist_ok=True)
            file = open(beside, "w+b")  # noqa: SIM115 (closed below, where failures are told apart)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if self.local:
                with self._explained(name):
                    os.replace(beside, self.path(name))
            else:
                self._upload(name, Path(beside))
        except OSError as error:  # others come from the block and are not about this file
            if error.errno in NO_MORE:
                raise explain(error, self.path(name)) from error
            raise
        finally:
            if os.path.exists(beside):
                os.unlink(beside)

    def put(self, name: str, content: bytes | Path) -> None:
        """Writes a file atomically, from bytes or from a local file."""
        self._refuse_http(name)
        if isinstance(content, bytes):
            with self.writing(name) as file:
                file.write(content)
        elif self.local:
            with self.writing(name) as file, open(content, "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        else:
            self._upload(name, content)

    def _refuse_http(self, name: str) -> None:
        if self.url.startswith("http"):
            raise UserError("http stores are read only", where=self.path(name), cure="write to a path or s3:// URL")

    def _upload(self, name: str, source: Path) -> None:
        """Sends a local file; the remote object appears only when all of it is there."""
        size = source.stat().st_size
        with self._explained(name):
            if size <= PART:
                self._attempt(lambda: self._sent(size, self.fs._put_file, str(source), self.path(name)))
            else:
                self._upload_parts(name, source, size, max(PART, -(-size // _MOST_PARTS)))

    def _upload_parts(self, name: str, source: Path, size: int, part: int) -> None:
        """Sends a file in parts, some at once, each with tries and a deadline of its own."""
        bucket, key, _ = self.fs.split_path(self.path(name))
        place = {"Bucket": bucket, "Key": key}
        begun = self._attempt(lambda: self._sent(0, self.fs._call_s3, "create_multipart_upload", **place))
        place["UploadId"] = begun["UploadId"]

        def send(number: int) -> dict[str, Any]:
            with source.open("rb") as file:
                file.seek((number - 1) * part)
                body = file.read(part)
            told = {**place, "PartNumber": number, "Body": body}
            sent = self._attempt(lambda: self._sent(len(body), self.fs._call_s3, "upload_part", **told))
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            with ThreadPool(_PARTS_AT_ONCE) as pool:  # of daemons: a process that must end waits for none of them
                parts = list(pool.imap(send, range(1, -(-size // part) + 1)))
            whole = {**place, "MultipartUpload": {"Parts": parts}}
            try:  # a store may take its time over joining a large file
                self._attempt(lambda: self._sent(size, self.fs._call_s3, "complete_multipart_upload", **whole))
            except OSError:  # a first answer may be lost, and a second one then knows no such upload
                if self._attempt(lambda: self.fs.info(self.path(name)))["ETag"].strip('"') != _tag_of_parts(parts):
                    raise
        except BaseException:
            with suppress(Exception):  # what cannot be thrown away now, the bucket's own rules do later
                self._sent(0, self.fs._call_s3, "abort_multipart_upload", **place)
            raise

    def _sent(self, size: int, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Runs a coroutine function of the file system, for as long as a body of that size may take."""
        seconds = PATIENCE + size / SLOWEST
        try:
            return fsspec.asyn.sync(self.fs.loop, call, *args, timeout=seconds, **named)
        except fsspec.asyn.FSTimeoutError as error:
            raise TimeoutError(f"{size} bytes were not taken within {seconds:.0f} s") from error

    def delete(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""
        try:
            self._attempt(lambda: self.fs.rm_file(self.path(name)))
        except FileNotFoundError:
            return
        except Exception as error:
            raise explain(error, self.path(name)) from error

    def discard_partials(self) -> None:
        """Removes what killed writers left beside; call it only while nobody writes here."""
        if self.local and os.path.isdir(self.url):
            for entry in os.scandir(self.url):
                if entry.name.startswith(".") and _PARTIAL in entry.name:
                    os.unlink(entry.path)

    def writable(self) -> bool:
        """Says whether files can be added, by adding and removing one."""
        try:
            self.probe()
        except (UserError, OSError):
            return False
        return True

    def probe(self) -> None:
        """Adds and removes an empty file.

        Raises:
            UserError: saying why that cannot be.
        """
        self.put(PROBE, b"")
        self.delete(PROBE)

    # ---- failures ----------------------------------------------------------------------------------------------

    def _attempt(self, call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        for attempt in Retrying(
            retry=retry_if_exception(transient),
            stop=_Standstill(progress),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=self._count,
            reraise=True,
        ):
            with attempt:
                return call()
        raise AssertionError("unreachable")

    def _count(self, attempt: RetryCallState) -> None:
        self.retries += 1
        now, waited = time.monotonic(), attempt.seconds_since_start or 0.0
        if waited >= TELL and now - self._told >= DEADLINE and attempt.outcome is not None:
            self._told = now
            why = type(attempt.outcome.exception()).__name__  # whose text may hold a signed URL
            log.warning(
                "%s: has failed for %.0f s (%s), trying again for up to %.0f s", self.url, waited, why, DEADLINE
            )

    def _retried(self, name: str, call: Callable[[], T]) -> T:
        with self._explained(name):
            return self._attempt(call)

    @contextmanager
    def _explained(self, name: str | Callable[[], str]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) or from_store(error):
                file = name if isinstance(name, str) else name()
                raise explain(error, self.path(file) if file else self.url) from error
            raise


class _Standstill:
    """Stops the tries of a request that has failed, and got no further, for `DEADLINE` seconds.

    The time of a first try counts for nothing: a large body may take longer than that and is still worth a second one.
    """

    def __init__(self, progress: Callable[[], int]) -> None:
        self._progress, self._seen, self._since = progress, -1, 0.0

    def __call__(self, attempt: RetryCallState) -> bool:
        now, seen = time.monotonic(), self._progress()
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since >= DEADLINE


class SignedReader:
    """Ranges of S3 objects by signed URLs: a sixth of the processor time of a request that is signed by itself.

    A URL is signed once an object with the credentials of s3fs, is good for an hour, and is never shown. What does not
    come this way is asked for through s3fs, which refreshes credentials and says what is wrong.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._failed = store, 0
        self._http: Any = None
        self._urls: dict[str, tuple[float, str]] = {}

    def read(self, paths: list[str], starts: list[int], ends: list[int]) -> list[bytes | Exception]:
        """Returns ranges of objects, or why they did not come."""
        got = self._by_url(paths, starts, ends)
        lacking = [i for i, data in enumerate(got) if isinstance(data, Exception) or len(data) != ends[i] - starts[i]]
        if lacking:
            chosen = ([values[i] for i in lacking] for values in (paths, starts, ends))
            again = self._store.fs.cat_ranges(*chosen, on_error="return")
            self._judge(got, again)
            for i, data in zip(lacking, again):
                got[i] = data
        else:
            self._failed = 0
        return got

    def _judge(self, got: list[bytes | Exception], again: list[bytes | Exception]) -> None:
        """Counts how often nothing came by URL and all of it without: while a store is down, neither does."""
        if any(isinstance(data, Exception) for data in again) or self._failed >= _SIGNED_TRIES:
            return
        self._failed = self._failed + 1 if all(isinstance(data, Exception) for data in got) else 0
        if self._failed == _SIGNED_TRIES:
            found = f"signed URLs are refused ({type(got[0]).__name__}): requests that are signed one by one take their"
            log.warning("%s: %s place, at six times the processor time", self._store.url, found)

    def _by_url(self, paths: list[str], starts: list[int], ends: list[int]) -> list[bytes | Exception]:
        if self._failed >= _SIGNED_TRIES:
            return [_NOT_SIGNED] * len(paths)
        try:
            urls = {path: self._url(path) for path in dict.fromkeys(paths)}
        except Exception:  # no credentials, or none that can sign: s3fs has the words for it
            self._failed = _SIGNED_TRIES
            return [_NOT_SIGNED] * len(paths)
        if self._http is None:
            self._http = fsspec.filesystem("http", encoded=True, **_options("http"))
        asked = [urls[path] for path in paths]
        got = self._http.cat_ranges(asked, starts, ends, batch_size=_CONNECTIONS, on_error="return")
        failed = sum(isinstance(data, Exception) for data in got)
        if failed:
            self._store.retries += failed
            self._urls.clear()  # signed with credentials that expired, perhaps
        return got

    def _url(self, path: str) -> str:
        signed, url = self._urls.get(path, (0.0, ""))
        if time.monotonic() - signed > _SIGNED_FOR / 2 or not url:
            url = self._store.fs.sign(path, expiration=_SIGNED_FOR)
            if len(self._urls) >= _SIGNED_KEPT:
                self._urls.clear()
            self._urls[path] = time.monotonic(), url
        return url


class _RemoteFile(io.RawIOBase):
    """A file of a remote store; what is read of it is tried again and explained as any other range."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._size, self._at = store, name, store.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        data = self._store.read_range(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def _tag_of_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    """Returns the tag that S3 gives to a file that came in parts: the MD5 of theirs, and how many."""
    tags = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    return f"{hashlib.md5(tags, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _written(entry: Mapping[str, Any]) -> float:
    when = entry.get("LastModified")
    return when.timestamp() if isinstance(when, datetime) else math.nan


def open_store(url: str | os.PathLike[str]) -> Store:
    """Returns the folder that a URL names; nothing is contacted yet."""
    return Store(url)


def _options(scheme: str) -> dict[str, Any]:
    if scheme == "s3":
        limits = {
            "signature_version": "s3v4",
            "connect_timeout": PATIENCE,
            "read_timeout": PATIENCE,
            "max_pool_connections": _CONNECTIONS,
        }
        return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **limits}}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)}}
    return {}
