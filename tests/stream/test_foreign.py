"""Tars that crossgate did not write."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from web import serving

from crossgate import environment
from crossgate.config import ClipConfig, DataConfig
from crossgate.errors import UserError
from crossgate.stream import foreign
from crossgate.stream.foreign import index_foreign, scan_tar
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader, sequential


def video_tensors(members, clip, augment, seed):
    """Stands for the codec: an ``mp4`` here is one byte, sounding if odd."""
    value = members["mp4"][0]
    found = {"rgb": torch.full(clip.shape("rgb"), value, dtype=torch.uint8)}
    return found | ({"audio": torch.ones(clip.shape("audio"))} if value % 2 else {})


def write_tar(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return folder / name


def video(key: str, number: int, **text) -> dict[str, bytes]:
    return {f"{key}.mp4": bytes([number]), f"{key}.json": json.dumps({"key": key, **text}).encode()}


def test_a_folder_of_video2dataset_is_streamed_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "others"
    for shard in range(3):
        members: dict[str, bytes] = {}
        for i in range(4):
            members |= video(f"{shard:05d}_{i:04d}", shard * 4 + i, url=f"http://v/{shard}{i // 2}")
            members[f"{shard:05d}_{i:04d}.txt"] = b"a caption"
        write_tar(folder, f"{shard:05d}.tar", members)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = []
    index = Index.load(str(folder), progress=lambda *counts: done.append(counts))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert {name: (folder / name).read_bytes() for name in before} == before, "a byte was rewritten"
    assert (folder / "index.json").exists()
    assert (index.splits["train"].clips, index.splits["train"].groups) == (12, 6)
    assert index.modalities == {"rgb": 12, "flow": 12, "audio": 12, "depth": 0}

    clip = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3)
    data = DataConfig(clip=clip, global_batch=4)
    loader = ClipLoader(Index.load(str(folder)), ["train"], data, seed=0, decode=video_tensors)
    batches = [batch for _, batch in zip(range(3), loader)]
    assert sorted(clip for batch in batches for clip in batch.clip.tolist()) == list(range(12))
    for batch in batches:
        assert (batch.streams["rgb"][:, 0, 0, 0, 0] == batch.clip).all()
        assert batch.present[:, 1].tolist() == [clip % 2 == 1 for clip in batch.clip.tolist()], "sound is seen by ear"


def test_tars_that_came_after_their_index_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "others"
    write_tar(folder, "a.tar", video("a", 1))
    index = Index.load(str(folder))
    assert index.strays() == []
    write_tar(folder, "b.tar", video("b", 2))
    again = Index.load(str(folder))
    assert again.digest == index.digest, "a run that goes on must find the clips that it began with"
    assert again.strays() == ["b.tar"]
    for name in ("index.json", "shards.parquet"):
        (folder / name).unlink()
    assert Index.load(str(folder)).names == ["a.tar", "b.tar"]


def test_what_webdataset_itself_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            writer.write(
                {"__key__": f"clip{i}", "mp4": bytes([i]), "json": {"split": "val", "labels": {"action": "run"}}}
            )
    index = Index.load(str(tmp_path))
    assert index.splits.keys() == {"val"}
    assert index.vocabularies == {"action": ["run"]}
    data = DataConfig(clip=ClipConfig(modalities=("rgb",), frames=1, size=16))
    assert [b.keys for b in sequential(index, ["val"], data, batch_size=2, decode=video_tensors)] == [
        ["clip0", "clip1"],
        ["clip2"],
    ]


def test_awkward_but_legal_tars(tmp_path: Path) -> None:
    dotted = video("v1.0", 1) | video("v1.1", 2)  # WebDataset would make one clip of both
    apart = {"a.mp4": b"\1", "b.mp4": b"\2", "a.json": b"{}", "notes.txt": b"x", "lonely.json": b"{no"}
    write_tar(tmp_path, "0.tar", {f"dir/{name}": data for name, data in dotted.items()})
    write_tar(tmp_path, "1.tar", apart)
    write_tar(tmp_path, "2.tar", {})
    index = index_foreign(str(tmp_path))
    assert index.clips.tolist() == [2, 2, 0]
    assert [index.sidecar(0).key(row) for row in range(2)] == ["dir/v1.0", "dir/v1.1"]
    assert sorted(index.sidecar(1).members(0)) == ["json", "mp4"]


def test_each_refusal_names_the_tar(tmp_path: Path) -> None:
    def refused(match: str, name: str = "0.tar") -> None:
        with pytest.raises(UserError, match=match) as caught:
            index_foreign(str(tmp_path))
        assert name in str(caught.value)
        assert not (tmp_path / "index.json").exists()

    path = write_tar(tmp_path, "0.tar", video("a", 1) | video("b", 2))
    whole = path.read_bytes()
    for cut in (512, 1024, 1300, 2048, 3000, 4096):
        path.write_bytes(whole[:cut])
        refused("tar")
    path.write_bytes(b"nonsense" * 200)
    refused("no whole tar")
    path.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
    refused("tar")
    write_tar(tmp_path, "0.tar", video("a", 1, split="train") | video("b", 2, split="test"))
    refused("splits 'test' and 'train'")
    write_tar(tmp_path, "0.tar", {"a.mp4": b"\1", "a.json": b"{no"})
    refused("a.json cannot be used")
    write_tar(tmp_path, "0.tar", {"a.json": b"[]", "a.mp4": b"\1"})
    refused("a.json cannot be used")
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.mp4"))
    refused("two members are named 'a.mp4'")
    write_tar(tmp_path, "0.tar", {"a.txt": b"x"})
    refused("no clips", "")
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(whole))
    refused("compressed", "1.tar.gz")
    (tmp_path / "1.tar.gz").unlink()
    for member in ("a.json.gz", "a.mp4.zst", "a.rgb.mp4.gz"):
        write_tar(tmp_path, "0.tar", video("b", 1) | {member: b"packed"})
        refused(f"member '{member}' is compressed")


def test_an_index_of_a_read_only_store_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "others"
    write_tar(folder, "0.tar", video("a", 1) | video("b", 2))
    monkeypatch.setenv("CROSSGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("crossgate.stream.storage.Store.writable", lambda self: False)
    index = Index.load(str(folder))
    assert os.listdir(folder) == ["0.tar"]
    assert index.home.url.startswith(str(environment.cache_dir()))
    monkeypatch.setattr(foreign, "_index_tar", None)
    assert Index.load(str(folder)).digest == index.digest, "the second time nothing is scanned"
    monkeypatch.undo()


def test_of_remote_tars_only_headers_and_descriptions_are_fetched(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CROSSGATE_CACHE", str(tmp_path / "cache"))
    members: dict[str, bytes] = {}
    for i in range(8):
        members |= {f"{i}.mp4": bytes(400_000), f"{i}.json": b'{"split": "val"}', f"{i}.txt": b"a caption"}
    length = write_tar(tmp_path / "others", "0.tar", members).stat().st_size
    with serving(tmp_path / "others") as web:
        index = Index.load(web.url)
        assert (index.splits["val"].clips, index.bytes.tolist()) == (8, [length])
        assert web.given["0.tar"] < length / 8


def test_a_disk_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path, "0.tar", video("a", 1))
    (tmp_path / "1.tar").symlink_to("/proc/self/mem")  # opens, and fails when read
    with pytest.raises(UserError, match=r"1.tar: cannot be read \(Input/output error\)"):
        Index.load(str(tmp_path))


def test_offsets_are_those_of_the_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path, "0.tar", video("k" * 150, 7))  # a long name takes extra header blocks
    with open(path, "rb") as file:
        [(record, split)] = scan_tar(file, "0.tar")
        offset, size = record.members["mp4"]
        file.seek(offset)
        assert (file.read(size), split) == (b"\7", "train")
