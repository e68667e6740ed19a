"""The image itself, where it was built: as nobody special, on a read-only root, within the local head's memory.

podman build -f k8s/image/Containerfile -t crossgate:0.1.0 .
pytest -m slow tests/k8s/test_image.py
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from manifests import named, objects_of, quantity

from crossgate import __version__

IMAGE = f"crossgate:{__version__}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    if not shutil.which("podman"):
        pytest.skip("no podman on this machine")
    if subprocess.run(["podman", "image", "exists", IMAGE], capture_output=True).returncode:
        pytest.skip(f"{IMAGE} has not been built on this machine")


def inside(home: Path, command: str) -> str:
    """Runs a shell line in the image as the local overlay's head would be run, without a network."""
    job = next(thing for thing in objects_of("local") if named(thing) == "RayJob/pretrain")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    home.chmod(0o777)
    words = ["podman", "run", "--rm", "--network", "none", "--read-only", "--user", "1000:1000", "--cap-drop", "ALL"]
    words += ["--security-opt", "no-new-privileges", "--shm-size", "1g", "--tmpfs", "/tmp:mode=1777,size=4g"]
    words += ["--memory", str(int(quantity(head["resources"]["limits"]["memory"])))]
    words += ["-v", f"{home}:/home/crossgate", "-e", "HOME=/home/crossgate", IMAGE, "bash", "-c", command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_doctor_is_green(tmp_path: Path) -> None:
    said = inside(tmp_path, "id -u; crossgate doctor")
    assert said.startswith("1000\n") and "all well" in said and "FAIL" not in said


def test_there_is_no_compiler_and_the_root_is_read_only(tmp_path: Path) -> None:
    said = inside(tmp_path, "command -v gcc cc g++ make; touch /x; true")
    assert "/gcc" not in said and "/make" not in said
    assert "Read-only file system" in said
