"""Bad input through the command line: one clear line, a non-zero exit, nothing half-written."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_road import tiny_tree

from crossgate.cli import main


def crossgate(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crossgate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **settings)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The same command line in this process: a process of its own takes seconds to import what a run needs."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["crossgate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, said.out, said.err)

    return run


def complaint(done: subprocess.CompletedProcess[str], *fragments: str, status: int = 2) -> None:
    """Asserts that the command failed with one line that has the fragments, and no stack trace."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("crossgate: ")]
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def shards_in(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.rglob("*") if path.is_file() and path.suffix in (".tar", ".json", ".parquet")
    )


@pytest.fixture
def rows(road: Path) -> list[dict[str, str]]:
    """The manifest's rows, with absolute paths."""
    with (road / "clips" / "manifest.csv").open() as file:
        found = list(csv.DictReader(file))
    for row in found:
        row["path"] = str(road / "clips" / row["path"])
        row["depth_path"] = str(road / "clips" / row["depth_path"]) if row["depth_path"] else ""
    return found[:12]


def write_manifest(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "mine.csv"
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_missing_video(rows: list[dict[str, str]], tmp_path: Path) -> None:
    rows[3]["path"] = str(tmp_path / "gone.mp4")
    done = crossgate("pack", write_manifest(tmp_path, rows), tmp_path / "out")
    complaint(done, "gone.mp4", "mine.csv")
    assert not shards_in(tmp_path / "out")


def test_video_without_frames(rows: list[dict[str, str]], tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"\0" * 64)
    rows[0]["path"] = str(empty)
    done = crossgate("pack", write_manifest(tmp_path, rows[:2]), tmp_path / "out", "--workers", 1)
    complaint(done, "empty.mp4")
    assert not (tmp_path / "out" / "index.json").exists()


def test_unknown_label(rows: list[dict[str, str]], tmp_path: Path) -> None:
    for row in rows:
        row.pop("action")
        row["label"] = row.pop("violence")
    rows[1]["label"] = "fihgt"
    done = crossgate("pack", write_manifest(tmp_path, rows), tmp_path / "out", "--classes", "fight,nofight")
    complaint(done, "fihgt", "did you mean 'fight'", "mine.csv")
    assert not shards_in(tmp_path / "out")


def test_group_in_two_splits(rows: list[dict[str, str]], tmp_path: Path) -> None:
    rows[0]["split"], rows[1]["split"] = "train", "test"
    rows[0]["group"] = rows[1]["group"] = "scene_x"
    complaint(crossgate("pack", write_manifest(tmp_path, rows), tmp_path / "out"), "scene_x", "train", "test")
    assert not shards_in(tmp_path / "out")


def test_modality_that_no_clip_has(rows: list[dict[str, str]], tmp_path: Path) -> None:
    for row in rows:
        row["depth_path"] = ""
    done = crossgate("pack", write_manifest(tmp_path, rows), tmp_path / "out", "--modalities", "rgb,depth")
    complaint(done, "depth")
    assert not shards_in(tmp_path / "out")


def test_a_disk_that_takes_no_more_while_packing(rows: list[dict[str, str]], tmp_path: Path) -> None:
    """A bound on the length of a file stands for the end of a disk: anybody may set one."""

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = crossgate("pack", write_manifest(tmp_path, rows), tmp_path / "out", "--workers", 1, preexec_fn=bounded)
    complaint(done, "File too large", "free some space")
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_full_disk_while_packing(rows: list[dict[str, str]], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        done = crossgate("pack", write_manifest(tmp_path, rows), small / "out", "--workers", 1)
        complaint(done, "space")
        assert not (small / "out" / "index.json").exists()
        assert not list((small / "out").rglob("*.tar"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_corrupt_tar(road: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(road / "shards", tmp_path / "shards")
    victim = min(shards.glob("*train*.tar"))
    body = bytearray(victim.read_bytes())
    body[len(body) // 2] ^= 0xFF
    victim.write_bytes(body)
    done = crossgate("check", shards, "--fast")
    assert done.returncode == 1
    assert victim.name in done.stderr
    assert "Traceback" not in done.stderr


def test_cut_tar_stops_a_run(road: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(road / "shards", tmp_path / "shards")
    victim = min(shards.glob("*train*.tar"))
    victim.write_bytes(victim.read_bytes()[:-10240])
    tree = tiny_tree(road, tmp_path / "runs", "pretrain", data={"index": str(shards)})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    complaint(crossgate("pretrain", "-c", tmp_path / "mine.yaml"), victim.name, "crossgate check")


def test_a_shard_that_only_the_end_of_a_run_would_read(road: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    shards = shutil.copytree(road / "shards", tmp_path / "shards")
    victim = min(shards.glob("*test*.tar"))
    victim.unlink()
    tree = tiny_tree(road, tmp_path / "runs", "pretrain", data={"index": str(shards)})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    said = [f"{shards}: shard {victim.name} of the index is not there;", f"crossgate check {shards}"]
    complaint(here("pretrain", "-c", tmp_path / "mine.yaml"), *said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("data.train=[trian]", ["trian", "did you mean 'train'"]),
        ("data.clip.modalities=[rgb,pose]", ["pose", "valid: audio, depth, flow, rgb"]),
        ("data.clip.modalities=[rgb,dpeth]", ["unknown modality 'dpeth'; did you mean 'depth'?"]),
        ("finetune.task=actoin", ["actoin", "did you mean 'action'"]),
        ("model.fusion.name=sofmax", ["sofmax", "softmax"]),
        ("model.encoders.rgb.backbone=resnet1818", ["resnet1818"]),
        ("finetune.init=nowhere", ["nowhere"]),
    ],
)
def test_recipes_that_the_index_cannot_serve(
    road: Path, tmp_path: Path, here: Callable[..., Any], override: str, fragments: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_tree(road, tmp_path / "runs", "finetune")))
    complaint(here("finetune", "-c", tmp_path / "mine.yaml", override), *fragments)


def test_unreachable_tracking_server(road: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_tree(road, tmp_path / "runs", "pretrain")))
        complaint(crossgate("pretrain", "-c", tmp_path / "mine.yaml", f"tracking.uri={uri}"), uri, "tracking.uri")
