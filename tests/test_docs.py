"""What the README and the docs name exists: links, commands, recipes, make targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "shards" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_that_are_named_exist(page: Path) -> None:
    from crossgate.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    text = page.read_text()
    blocks = re.findall(r"^(?: {4}|`{3}.*\n)(?:.*)$", text, flags=re.MULTILINE)
    named = set(re.findall(r"(?:^|`|\s{4}|&& )crossgate ([a-z]+)\b", "\n".join(blocks) + text))
    named &= set(re.findall(r"`crossgate ([a-z]+)", text)) | set(
        re.findall(r"^ {4}crossgate ([a-z]+)", text, re.MULTILINE)
    )
    assert named <= known, f"{page.name} names {sorted(named - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_and_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for recipe in re.findall(r"jobs/recipes/[\w.-]+\.yaml", text):
        assert (ROOT / recipe).exists(), f"{page.name} names {recipe}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`|^ {4}make ([a-z-]+)", text, re.MULTILINE))
    assert {one or other for one, other in named} <= targets, page.name


def test_the_page_on_gates_names_every_fusion_once() -> None:
    from crossgate.model.fusion import FUSIONS

    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "gates.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(FUSIONS)


def test_ci_runs_the_readmes_own_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("make demo", "make test"):
        assert re.search(rf"^stage {command}$", script, re.MULTILINE), command


def test_constraints_pin_what_the_project_names() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        d for group in ("test", "check") for d in project["optional-dependencies"][group]
    ]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    for requirement in wanted:
        name = re.split(r"[\[<>=!~ ]", requirement)[0].lower().replace("_", "-")
        assert name in pinned, f"{name} has no tested version in constraints.txt"
    assert not any("+cpu" in line for line in (ROOT / "constraints.txt").read_text().split())


def test_hooks_are_local() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
