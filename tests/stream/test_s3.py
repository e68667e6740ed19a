"""The same corpus through the S3 protocol."""

from __future__ import annotations

import time
from collections.abc import Iterator

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from small_corpora import write_corpus
from stub_codec import number_tensors

from crossgate.config import ClipConfig, DataConfig
from crossgate.errors import UserError
from crossgate.stream import storage
from crossgate.stream.check import check
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader
from crossgate.stream.storage import open_store
from crossgate.training.upload import refuse_unwritable

pytestmark = pytest.mark.s3
COUNTS = {"train": [5, 0, 7], "val": [3]}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Endpoint and credentials come from the environment alone."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="clips")
    yield "s3://clips/corpus"
    s3fs.S3FileSystem.clear_instance_cache()


def test_packed_read_checked_and_streamed_as_from_disk(bucket: str, make_corpus) -> None:
    local, remote = make_corpus(COUNTS), write_corpus(bucket, COUNTS)
    assert Index.load(bucket).digest == remote.digest == local.digest
    assert open_store(bucket).list(".tar") == local.names
    report = check(bucket, workers=1, decode=number_tensors)
    assert (report.ok, report.decoded) == (True, 15)
    clip = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3)
    for workers in (0, 2):
        data = DataConfig(clip=clip, global_batch=4, loader_workers=workers)
        loaders = [ClipLoader(index, ["train"], data, seed=0, decode=number_tensors) for index in (local, remote)]
        for _, here, there in zip(range(5), *loaders):
            assert here.keys == there.keys
            assert (here.streams["rgb"] == there.streams["rgb"]).all()


def test_failures_are_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="s3://nobucket/x.*no such file or bucket|s3://nobucket/x: neither"):
        Index.load("s3://nobucket/x")
    remote = write_corpus(bucket, COUNTS)
    open_store(bucket).put("train-000000.tar", b"short")
    data = DataConfig(global_batch=12, clip=ClipConfig(modalities=("rgb",)))
    loader = ClipLoader(remote, ["train"], data, seed=0, decode=number_tensors)
    with pytest.raises(UserError, match="train-000000.tar: the shard changed since it was indexed"):
        next(iter(loader))
    monkeypatch.setattr(storage, "DEADLINE", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="storage failed .*check that it is reachable"):
        Index.load(bucket)


def test_lengths_and_times_come_with_the_listing_and_missing_shards_are_told(bucket: str) -> None:
    index = write_corpus(bucket, COUNTS)
    about = open_store(bucket).details()
    assert list(about) == open_store(bucket).list()
    assert [about[name].size for name in index.names] == index.bytes.tolist()
    assert all(abs(one.modified - time.time()) < 600 for one in about.values())
    assert index.missing(["train", "val"]) == []
    index.store.delete("val-000000.tar")
    assert index.missing(["train", "val"]) == ["val-000000.tar"]


def test_a_bucket_that_is_not_there_takes_nothing(bucket: str) -> None:
    store = open_store("s3://none/runs")
    assert not store.writable()
    with pytest.raises(
        UserError, match="training.checkpoint_url, s3://none/runs: it takes no checkpoints .no such file"
    ):
        refuse_unwritable(store)
