"""The image itself, where it was built: as nobody special, on a read-only root, through the local overlay's own job.

podman build --format docker -f k8s/image/Containerfile -t crossgate:0.1.0 .
pytest -m slow tests/k8s/test_image.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from manifests import named, objects_of
from pod_drill import Drill
from pods import Node, missing

from crossgate import __version__

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    reason = missing(f"crossgate:{__version__}")
    if reason:
        pytest.skip(reason)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node.up(tmp_path, objects_of("local")) as node:
        yield node


def inside(node: Node, command: str) -> str:
    """What a shell line says where the local overlay's head would run it."""
    job = next(thing for thing in objects_of("local") if named(thing) == "RayJob/pretrain")
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return node.run("head", pod, pod["containers"][0], ["bash", "-c", command])


def test_doctor_is_green(node: Node) -> None:
    said = inside(node, "id -u; crossgate doctor")
    assert "1000" in said.splitlines() and "all well" in said and "FAIL" not in said


def test_there_is_no_compiler_and_the_root_is_read_only(node: Node) -> None:
    said = inside(node, "command -v gcc cc g++ make; touch /x; true")
    assert "/gcc" not in said and "/make" not in said
    assert "Read-only file system" in said


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(2400)
def test_local_job_resumes_after_its_head_is_lost(tmp_path: Path) -> None:
    """Minutes; what it says step by step: python tests/k8s/pod_drill.py."""
    steps: list[str] = []
    figures = Drill(tmp_path, steps.append).run()
    assert 0 < figures["resumed_from"] < figures["steps"], steps
