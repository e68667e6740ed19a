"""The shape of the code: where things live and which way imports run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "platform" / "crossgate"
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> what it may import of ours; the ground floor (single files) is open to all.
GROUND = {
    "modality",
    "progress",
    "config",
    "errors",
    "batch",
    "environment",
    "recipe",
    "_version",
    "_torchvision",
    "workers",
    "yaml_file",
}
ALLOWED: dict[str, set[str]] = {
    "clips": set(),
    "stream": {"clips"},
    "model": set(),
    "objectives": set(),
    "tasks": {"model", "objectives"},
    "tracking": set(),
    "evaluation": set(),
    "deploy": set(),
    "registry": {"model", "clips", "tracking"},
    "training": {"tasks", "stream", "tracking", "model"},
    "runs": {"clips", "stream", "model", "tasks", "training", "evaluation", "tracking", "registry"},
    "cluster": {"runs", "training", "stream", "tracking", "clips", "evaluation", "registry"},
}


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_platform_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists(), "it would shadow Python's own platform module"


def test_everything_imports_in_the_repository_root() -> None:
    code = "import platform, torch, ray, crossgate, timm; platform.system(); timm.create_model('test_vit')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("crossgate.")} - GROUND - {room}
    if room in ALLOWED:
        assert ours <= ALLOWED[room], f"{room} reaches into {sorted(ours - ALLOWED[room])}"
    elif room in GROUND:
        assert not ours, f"the ground floor reaches into {sorted(ours)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_the_house_rules(path: Path) -> None:
    text, room = path.read_text(), room_of(path)
    assert text.count("\n") <= 600, "which second idea lives in it?"
    used = imports_of(path)
    if room not in ("cluster", "cli"):
        assert not any(name == "ray" or name.startswith("ray.") for name in used), "only cluster/ knows about Ray"
    if room != "environment":
        assert "os.environ" not in text, "environment variables are read in environment.py"
        assert "os.getenv" not in text, "environment variables are read in environment.py"
    assert not any(name == "pickle" or name.startswith("pickle.") for name in used), "data is not code"


def test_every_foreign_import_is_declared() -> None:
    """A package that only comes with another one may be gone, or another version, with that one's next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["depth"]
    declared = {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower() for line in lines}
    providers = packages_distributions()
    foreign: dict[str, Path] = {}
    for path in FILES:
        for name in {name.partition(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"crossgate"}:
            foreign.setdefault(name, path)
    undeclared = {
        name: str(path.relative_to(ROOT))
        for name, path in foreign.items()
        if declared.isdisjoint(distribution.lower() for distribution in providers.get(name, [name]))
    }
    assert undeclared == {}
