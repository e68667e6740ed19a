"""Packing over Ray: the bytes of the local way, after an interruption too; and what a Ray worker can import."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from crossgate.clips.synth import generate
from crossgate.cluster import paths
from crossgate.cluster.doctor import _worker_probe
from crossgate.cluster.pack import pack as pack_over_ray
from crossgate.errors import UserError
from crossgate.runs.pack import PackSettings
from crossgate.runs.pack import pack as pack_here

SETTINGS = PackSettings(workers=1, short_side=48, shard_clips=3)


def tree(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("clips") / "clips", clips=12, size=(64, 48), workers=1)


@pytest.mark.ray
def test_ray_packs_the_bytes_of_the_local_way_and_goes_on_after_a_stop(manifest, tmp_path, ray_cluster):
    local = pack_here(manifest, str(tmp_path / "local"), SETTINGS)

    def stop(done: int, total: int) -> None:
        if done > 3:  # one unit is whole, the next is begun
            raise KeyboardInterrupt

    out = tmp_path / "ray"
    with pytest.raises(KeyboardInterrupt):
        pack_here(manifest, str(out), SETTINGS, stop)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(kept) == 1

    steps: list[tuple[int, int]] = []
    index = pack_over_ray(manifest, str(out), SETTINGS, lambda *step: steps.append(step))
    assert steps[0][0] == 6
    assert steps[-1] == (12, 12)
    assert index.digest == local.digest
    assert tree(out) == tree(tmp_path / "local")
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


@pytest.mark.ray
def test_a_bad_video_in_a_task_is_the_same_line(manifest, tmp_path, ray_cluster):
    (manifest.parent / "broken.mp4").write_bytes(b"nothing")
    path = manifest.with_name("bad.csv")
    path.write_text("path,label\nbroken.mp4,fight\n")
    with pytest.raises(UserError, match=r"broken\.mp4: not decodable"):
        pack_over_ray(path, str(tmp_path / "out"), SETTINGS)
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.ray
def test_a_ray_worker_imports_the_package_and_timm(ray_cluster):
    assert ray_cluster.get(ray_cluster.remote(_worker_probe).remote(), timeout=120) == "ok"


def test_a_jobs_shards_are_kept_outside_the_folder_that_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").touch()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", "/home/someone")
    assert paths.written("shards") == "/home/someone/crossgate/shards"
    assert paths.written("s3://bucket/shards") == "s3://bucket/shards"
    assert paths.read("mine.csv") == str(tmp_path / "mine.csv")
    assert paths.read("other.csv") == "/home/someone/crossgate/other.csv"
