"""Packing: from a CSV file to an index, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_videos import write_video

from crossgate.clips.tensors import clip_tensors
from crossgate.config import ClipConfig
from crossgate.errors import UserError
from crossgate.runs import pack as packing
from crossgate.runs.pack import PackSettings, pack, pack_unit, plan_pack
from crossgate.stream.index import Index
from crossgate.stream.reader import read_clips
from crossgate.stream.storage import open_store

ONE = PackSettings(workers=1, seconds=1.0, short_side=48, shard_clips=3)


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Eight videos in four groups, half of them with sound, one of three clips."""
    folder = tmp_path_factory.mktemp("videos")
    lines = ["path,label,split,group,scene,degraded_rgb"]
    for i in range(8):
        write_video(folder / f"v{i}.mp4", i, frames=36 if i == 2 else 12, sound=i % 2 == 0)
        split = "test" if i >= 6 else "train"
        lines.append(f"v{i}.mp4,{'fight' if i % 2 else 'nofight'},{split},g{i // 2},s,{'0.5' if i == 1 else ''}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def manifest(videos: Path) -> Path:
    return videos / "manifest.csv"


def tree(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def change(manifest: Path, name: str, edit) -> Path:
    """A manifest beside the videos with changed lines."""
    path = manifest.with_name(name)
    path.write_text("\n".join(edit(manifest.read_text().splitlines())) + "\n")
    return path


def test_what_a_manifest_becomes(manifest, tmp_path):
    steps: list[tuple[int, int]] = []
    index = pack(manifest, str(tmp_path / "out"), ONE, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (8, 8)
    assert sum(split.clips for split in index.splits.values()) == 10
    assert set(index.splits) == {"train", "val", "test"}
    assert index.vocabularies == {"violence": ["fight", "nofight"]}
    assert index.modalities == {"rgb": 10, "flow": 10, "audio": 6, "depth": 0}
    assert index.digest == Index.load(str(tmp_path / "out")).digest
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {name for name in names if "packed" in name or name == "pack.json" or name.startswith(".")}
    members = read_clips(index, index.select(["test"]), np.arange(2))
    record = json.loads(members[0]["json"])
    assert record["labels"] == {"violence": "nofight"} or record["labels"] == {"violence": "fight"}
    assert record["extra"] == {"scene": "s"}
    assert (record["frames"], record["fps"], record["seconds"]) == (12, 12.0, 1.0)
    tensors = clip_tensors(members[0], ClipConfig(size=32, seconds=1.0))
    assert {"rgb", "flow"} <= set(tensors)


def test_clips_of_a_video_share_its_group(manifest, tmp_path):
    index = pack(manifest, str(tmp_path / "out"), ONE)
    home: dict[str, set[str]] = {}
    starts: dict[str, list[float]] = {}
    for split in index.splits:
        selection = index.select([split])
        for members in read_clips(index, selection, np.arange(selection.total)):
            record = json.loads(members["json"])
            home.setdefault(record["group"], set()).add(split)
            starts.setdefault(record["source"]["path"], []).append(record["source"]["start"])
    assert all(len(splits) == 1 for splits in home.values())
    assert starts["v2.mp4"] == [0.0, 1.0, 2.0]


def test_degradations_and_depth_reach_the_shard(videos, manifest, tmp_path):
    settings = ONE.model_copy(update={"estimator": "crossgate.nothing:here"})
    with pytest.raises(UserError, match="no such depth estimator"):
        pack(manifest, str(tmp_path / "a"), settings)
    index = pack(manifest, str(tmp_path / "b"), ONE)
    found = []
    for split in index.splits:
        selection = index.select([split])
        records = [json.loads(m["json"]) for m in read_clips(index, selection, np.arange(selection.total))]
        found += [record["degraded"] for record in records if record["source"]["path"] == "v1.mp4"]
    assert found == [{"rgb": 0.5}]


def test_webdataset_reads_what_was_packed(manifest, tmp_path):
    import webdataset

    index = pack(manifest, str(tmp_path / "out"), ONE)
    urls = [str(tmp_path / "out" / name) for name in index.names]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None))
    assert len(samples) == 10
    assert {"json", "rgb.mp4", "flow.mp4"} <= set(samples[0])


def test_workers_change_nothing_and_workers_need_no_torch(manifest, tmp_path):
    pack(manifest, str(tmp_path / "one"), ONE)
    pack(manifest, str(tmp_path / "two"), ONE.model_copy(update={"workers": 2}))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    script = "import sys, crossgate.runs.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_packing_again_is_free_and_other_settings_are_refused(manifest, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    first = pack(manifest, out, ONE)
    monkeypatch.setattr(packing, "pack_unit", lambda *_: pytest.fail("packed again"))
    assert pack(manifest, out, ONE).digest == first.digest
    with pytest.raises(UserError, match="other shards are in this folder"):
        pack(manifest, out, ONE.model_copy(update={"fps": 6.0}))


def test_a_killed_packing_continues(manifest, tmp_path):
    """SIGKILL in the middle; what was finished is kept, and the result is that of an undisturbed packing."""
    out = tmp_path / "out"
    script = (
        "import os, signal\n"
        "from crossgate.runs import pack as p\n"
        f"settings = p.PackSettings.model_validate_json({ONE.model_dump_json()!r})\n"
        "def step(done, total):\n"
        "    if done == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"p.pack({str(manifest)!r}, {str(out)!r}, settings, step)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not (out / "index.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert kept
    with pytest.raises(UserError, match="begun here"):
        pack(manifest, str(out), ONE.model_copy(update={"fps": 6.0}))
    steps: list[int] = []
    pack(manifest, str(out), ONE, progress=lambda done, total: steps.append(done))
    assert steps[0] > 1
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    pack(manifest, str(tmp_path / "whole"), ONE)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_damaged_shard_is_packed_again(manifest, tmp_path):
    out = tmp_path / "out"
    store = open_store(str(out))
    _, units = plan_pack(manifest, ONE)
    store.put("pack.json", json.dumps({"digest": units[0].digest}).encode())
    report = pack_unit(store, units[0], ONE)
    shard = out / report.shards[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    pack(manifest, str(out), ONE)
    pack(manifest, str(tmp_path / "whole"), ONE)
    assert tree(out) == tree(tmp_path / "whole")


def test_what_a_corpus_lacks_is_said_when_it_is_packed(manifest, tmp_path):
    whole = pack(manifest, str(tmp_path / "whole"), ONE).summary()
    assert "note" not in whole
    path = change(manifest, "fights.csv", lambda lines: [lines[0], *(one for one in lines[1:7] if "fight,t" in one)])
    path = change(path, "fights.csv", lambda lines: [one for one in lines if "nofight" not in one])
    said = pack(path, str(tmp_path / "lacking"), ONE).summary()
    assert "no test split" in said
    assert "violence has one class only (fight)" in said


def test_a_bad_video_stops_with_its_name(videos, manifest, tmp_path):
    (videos / "broken.mp4").write_bytes((videos / "v0.mp4").read_bytes()[:900])
    path = change(manifest, "bad.csv", lambda lines: [*lines, "broken.mp4,fight,train,g9,s,"])
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        with pytest.raises(UserError, match=r"broken\.mp4: not decodable"):
            pack(path, str(out), ONE.model_copy(update={"workers": workers}))
        assert not (out / "index.json").exists()
        assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_bad_videos_can_be_skipped_and_are_named(videos, manifest, tmp_path):
    (videos / "broken.mp4").write_bytes((videos / "v0.mp4").read_bytes()[:900])
    path = change(manifest, "bad.csv", lambda lines: [*lines, "broken.mp4,fight,train,g9,s,"])
    index = pack(path, str(tmp_path / "out"), ONE.model_copy(update={"skip_bad": True, "val_fraction": 0.0}))
    assert sum(split.clips for split in index.splits.values()) == 10
    assert len(index.settings["skipped"]) == 1
    assert "broken.mp4" in index.settings["skipped"][0]


def test_only_bad_videos_leave_nothing(videos, tmp_path):
    (videos / "broken.mp4").write_bytes(b"nothing")
    (videos / "only.csv").write_text("path,label\nbroken.mp4,fight\n")
    with pytest.raises(UserError, match="no video could be packed"):
        pack(videos / "only.csv", str(tmp_path / "out"), ONE.model_copy(update={"skip_bad": True}))
    assert not list((tmp_path / "out").iterdir())


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as target:
        track = target.add_stream("aac", rate=16_000, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        block.sample_rate = 16_000
        target.mux(track.encode(block))
        target.mux(track.encode(None))


def test_bad_input_is_one_line_and_nothing_is_written(videos, manifest, tmp_path):
    audio_only(videos / "sound.mp4")
    cases = {
        "missing video": (lambda lines: [*lines, "none.mp4,fight,train,g9,s,"], {}, "line 10: no such video"),
        "without pictures": (lambda lines: [*lines, "sound.mp4,fight,train,g9,s,"], {}, "sound.mp4: no pictures"),
        "torn group": (lambda lines: [*lines, "v9.mp4,fight,test,g0,s,"], {}, "group 'g0' is in split 'test'"),
        "label": (lambda lines: lines, {"classes": ("fight", "calm")}, "unknown label 'nofight'"),
        "split": (lambda lines: lines, {"splits": ("valid",)}, "split 'valid' has no videos"),
        "depth": (lambda lines: lines, {"modalities": ("rgb", "depth")}, "no clip has depth"),
        "sound": (lambda lines: [lines[0], lines[2]], {"modalities": ("rgb", "audio")}, "no clip has audio"),
    }
    for name, (edit, settings, message) in cases.items():
        out = tmp_path / name.replace(" ", "_")
        with pytest.raises(UserError) as caught:
            pack(change(manifest, "case.csv", edit), str(out), ONE.model_copy(update=settings))
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value)
        assert not list(out.glob("index.json")) + list(out.glob(".*")), name


def test_a_track_of_silence_is_no_audio(videos, tmp_path, monkeypatch):
    """Found only after decoding: still no index, and no shards that could never be used."""
    monkeypatch.setattr("crossgate.clips.media.SILENCE", 2.0)
    settings = ONE.model_copy(update={"modalities": ("rgb", "audio")})
    with pytest.raises(UserError, match="no clip has audio; leave it out: --modalities rgb"):
        pack(videos / "manifest.csv", str(tmp_path / "out"), settings)
    assert not list((tmp_path / "out").iterdir())


def test_unknown_modality():
    with pytest.raises(ValueError, match="unknown modality 'sound'"):
        PackSettings(modalities=("sound",))


def test_a_full_disk_is_one_line_and_packing_continues_after(manifest, tmp_path, monkeypatch):
    from crossgate.stream import shards

    out = tmp_path / "out"
    original = shards._Hashed.write

    def full(self, data):
        if self.length > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, data)

    monkeypatch.setattr(shards._Hashed, "write", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        pack(manifest, str(out), ONE)
    assert not list(out.glob("*.tar")) + list(out.glob(".*")) + list(out.glob("index.json"))
    monkeypatch.undo()
    pack(manifest, str(out), ONE)
    assert (out / "index.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_disk(manifest, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out)], check=False)
    if mounted.returncode:
        pytest.skip("no mounts here")
    try:
        with pytest.raises(UserError, match="no space left on the disk"):
            pack(manifest, str(out), ONE.model_copy(update={"workers": 2, "shard_clips": 8}))
        assert not list(out.glob(".*")) + list(out.glob("index.json"))
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.corpus
def test_real_depth_clips(corpus, tmp_path):
    index = pack(corpus / "rgbd" / "manifest.csv", str(tmp_path / "out"), PackSettings(shard_clips=16))
    assert index.modalities == {"rgb": 32, "flow": 32, "audio": 0, "depth": 32}
    assert sum(split.clips for split in index.splits.values()) == 32
    members = read_clips(index, index.select(["test"]), np.arange(6))
    for clip in members:
        tensors = clip_tensors(clip, ClipConfig())
        assert set(tensors) == {"rgb", "flow", "depth"}
        assert 0.1 < tensors["depth"].max() < 16
