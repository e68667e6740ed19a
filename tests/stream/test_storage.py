"""Folders by URL: what may be opened, what is written, what failures say."""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from crossgate.errors import Unreachable, UserError, writing
from crossgate.stream import storage
from crossgate.stream.failures import explain
from crossgate.stream.storage import Store, open_store


@pytest.mark.parametrize("url", ["pipe:cat x", "simplecache::s3://b/x", "ftp://h/x", "file://x::s3://b", "gs://b/x"])
def test_other_kinds_of_url_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="not read; expected a path, or an s3, http or https URL$"):
        open_store(url)


@pytest.mark.parametrize("url", ["https://a:s3cret@h/x", "s3://K:s3cret/9@b", "http://s3cret@h:80", "ftp://s3cret@h"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://h:8080/a@b", "s3://b/a@b:c", "x@y:z/shards"])
def test_names_and_ports_are_no_credentials(url: str) -> None:
    assert open_store(url).url.endswith(url)


def test_local_files_come_and_go_whole(store: Store) -> None:
    assert not store.exists("a.tar")
    store.put("a.tar", b"0123456789")
    store.put("b.json", b"{}")
    assert store.list(".tar") == ["a.tar"]
    assert (store.size("a.tar"), store.read("a.tar")) == (10, b"0123456789")
    assert store.read_ranges([("a.tar", 7, 9), ("a.tar", 0, 2), ("b.json", 0, 2)]) == [b"78", b"01", b"{}"]
    with contextlib.suppress(RuntimeError), store.writing("a.tar") as file:
        file.write(b"half")
        raise RuntimeError
    assert store.read("a.tar") == b"0123456789"
    assert store.list() == ["a.tar", "b.json"]
    store.delete("a.tar")
    store.delete("a.tar")
    assert store.list() == ["b.json"]


def test_a_store_crosses_process_borders(store: Store) -> None:
    store.put("x", b"1")
    assert store.fs is not None
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_failures_are_one_line(store: Store) -> None:
    with pytest.raises(UserError, match="no such file"):
        store.read("nothing")
    full = explain(OSError(errno.ENOSPC, "full"), "x")
    assert "no space left on the disk" in str(full)
    denied = (explain(PermissionError(), where) for where in ("s3://b/x", "/shards/x"))
    assert [error.cure for error in denied] == [
        "check the credentials of your environment or profile",
        "check who may read and write there",
    ]


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "mount it writable, or name a folder that is"),
        (errno.EIO, "check the disk or its mount"),
    ],
)
def test_a_disk_that_takes_no_more_is_cured_by_what_it_says(number: int, cure: str) -> None:
    said = OSError(number, os.strerror(number))
    assert str(explain(said, "x")).endswith(f"; {cure} and start again")
    for failure in (said, type("SafetensorError", (Exception,), {})(f"I/O error: {said.strerror} (os error {number})")):
        with (
            pytest.raises(UserError, match=rf"cannot write a model \(.*{said.strerror}.*\); {cure}$"),
            writing("a model", "x"),
        ):
            raise failure
    with pytest.raises(UserError, match="; check the path and who may write there$"), writing("a model", "x"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_passing_failures_are_tried_again_and_lasting_ones_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "DEADLINE", 5.0)
    calls: list[int] = []

    def fail(error: Exception, times: int) -> bytes:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return b"there"

    assert store._retried("x", lambda: fail(OSError("reset"), 2)) == b"there"
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(UserError, match="access denied"):
        store._retried("x", lambda: fail(PermissionError(), 9))
    assert len(calls) == 1


def test_a_store_that_stays_away_is_told_once_while_it_is_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "DEADLINE", 3.0)
    begun = time.monotonic()

    def fail(until: float) -> bytes:
        if time.monotonic() - begun < until:
            raise ConnectionResetError("at http://h/?X-Amz-Credential=s3cret")
        return b"there"

    def told() -> list[str]:  # of this store: threads that other tests left behind may still try theirs
        return [line for line in (record.getMessage() for record in caplog.records) if line.startswith(store.url)]

    monkeypatch.setattr(storage, "TELL", 60.0)
    assert store._retried("x", lambda: fail(0.3)) == b"there"
    assert not told(), "what passes soon is nobody's business"
    monkeypatch.setattr(storage, "TELL", 0.0)  # at the first failure: what comes later hangs on the machine
    begun = time.monotonic()
    assert [store._retried("x", partial(fail, until)) for until in (1.0, 2.0)] == [b"there"] * 2
    (line,) = told()
    assert line.startswith(f"{store.url}: has failed for 0 s (ConnectionResetError), trying again for up")
    assert "s3cret" not in caplog.text


def test_an_answer_that_does_not_come_is_another_error_than_one_that_says_no() -> None:
    down = pickle.loads(pickle.dumps(explain(ConnectionResetError("reset"), "s3://b/x")))
    assert isinstance(down, Unreachable) and "s3://b/x: storage failed (ConnectionResetError: reset)" in str(down)
    for said_no in (PermissionError(), FileNotFoundError(), OSError(errno.ENOSPC, "full")):
        assert type(explain(said_no, "s3://b/x")) is UserError


class _Clock:
    """The time that `storage` sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(storage.time, "monotonic", lambda: self.now)


def test_the_deadline_counts_from_the_first_failure_and_anew_with_every_progress(monkeypatch) -> None:
    clock, come = _Clock(monkeypatch), [0]
    standstill = storage._Standstill(lambda: come[0])
    clock.now = 500.0  # a long upload that broke is worth a second try
    assert not standstill(None)
    clock.now += storage.DEADLINE - 1
    assert not standstill(None)
    come[0] += 1
    clock.now += 10
    assert not standstill(None)
    clock.now += storage.DEADLINE
    assert standstill(None)


class _Ranges:
    """A file system of which some shards are gone for now, or for ever."""

    def __init__(self, **failures: Exception) -> None:
        self.failures = failures

    def cat_ranges(
        self, names: list[str], starts: list[int], ends: list[int], on_error: str
    ) -> list[bytes | Exception]:
        shards = [name.rsplit("/", 1)[-1].removesuffix(".tar") for name in names]
        return [self.failures.get(shard, bytes(end - start)) for shard, start, end in zip(shards, starts, ends)]


def test_the_shard_that_failed_is_named_and_not_the_first_one(store: Store, monkeypatch) -> None:
    monkeypatch.setattr(storage, "DEADLINE", 0.0)
    ranges = [("a.tar", 0, 9), ("b.tar", 0, 9), ("c.tar", 0, 9)]
    store._fs = _Ranges(b=ConnectionResetError("reset"))
    with pytest.raises(Unreachable, match="b.tar: storage failed"):
        store.read_ranges(ranges)
    store._fs = _Ranges(b=ConnectionResetError("reset"), c=FileNotFoundError())
    with pytest.raises(UserError, match="c.tar: no such file"):
        store.read_ranges(ranges)


def test_only_what_comes_without_counts_against_signed_urls(store: Store, monkeypatch) -> None:
    reader = storage.SignedReader(store)
    lost: list[bytes | Exception] = [ConnectionResetError("reset")]
    monkeypatch.setattr(reader, "_by_url", lambda paths, starts, ends: list(lost))
    store._fs = _Ranges(a=ConnectionResetError("reset"))
    for _ in range(2 * storage._SIGNED_TRIES):
        reader.read(["a.tar"], [0], [9])
    assert reader._failed == 0, "the store was down"
    store._fs = _Ranges()
    for _ in range(storage._SIGNED_TRIES):
        assert reader.read(["a.tar"], [0], [9]) == [bytes(9)]
    assert reader._failed == storage._SIGNED_TRIES


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that takes connections and never says a word, not even that a body may be sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        monkeypatch.setattr(storage, "PATIENCE", 0.5)
        monkeypatch.setattr(storage, "DEADLINE", 1.0)
        S3FileSystem.clear_instance_cache()  # it remembers where the store was
        yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("size", [0, 1000, storage.PART + 1])
@pytest.mark.timeout(200)
def test_what_a_store_never_takes_is_given_up(silent, tmp_path: Path, monkeypatch, size: int) -> None:
    monkeypatch.setattr(storage, "SLOWEST", 1 << 30)
    (tmp_path / "file").write_bytes(bytes(size))
    with pytest.raises(Unreachable, match="s3://bucket/runs/name: storage failed"):
        Store("s3://bucket/runs").put("name", tmp_path / "file")


# ---- http --------------------------------------------------------------------------------------------------------


class _Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves ranges; every third request for one breaks off in the middle of its body."""

    protocol_version = "HTTP/1.1"
    count = 0

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if not path.is_file() or not wanted:
            super().do_GET()
            return
        first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.end_headers()
        type(self).count += 1
        if type(self).count % 3 == 0:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Flaky, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_ranges_over_http_survive_broken_bodies(web: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "a.tar").write_bytes(data)
    store = open_store(web)
    ranges = [("a.tar", i * 100, i * 100 + 90) for i in range(20)]
    assert store.read_ranges(ranges) == [data[start:end] for _, start, end in ranges]
    assert _Flaky.count > 20, "nothing was tried again"
    assert (store.size("a.tar"), store.exists("a.tar"), store.exists("b.tar")) == (len(data), True, False)
    with pytest.raises(UserError, match="read only"):
        store.put("x", b"")
    assert not store.writable()
