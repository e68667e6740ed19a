"""`crossgate explain`: every key of every section, with its default and its docstring."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.explain import explain
from crossgate.model.fusion import FUSIONS

SECTIONS = [
    name
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
]


def test_the_overview_names_every_key_of_a_recipe() -> None:
    lines = explain().splitlines()
    for name in Recipe.model_fields:
        assert any(line.startswith((f"  {name}:", f"  {name}  [")) for line in lines), name


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_section_is_told_with_what_it_means(section: str) -> None:
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    said = explain(section).splitlines()
    assert said[0].startswith(f"{section}: ")
    assert len(said[2:]) == len(model.model_fields)
    for line, name in zip(said[2:], model.model_fields):
        assert line.strip().startswith(name)
        assert len(line.split("]", 1)[-1].strip()) > 5, f"{section}.{name} has no docstring"


def test_defaults_are_those_of_the_settings() -> None:
    assert f"lr  [default {Recipe(kind='pretrain').optim.lr!r}; float > 0" in explain("optim")


def test_sections_within_sections() -> None:
    assert "frames  [default 8; int >= 1]" in explain("data.clip")


def test_fusions_are_all_there() -> None:
    for name in FUSIONS:
        assert f"  {name} " in explain("fusion")


def test_one_key_is_explained_alone() -> None:
    said = explain("data.clip.frames")
    assert said.startswith("data.clip.frames  [default 8; int >= 1]")
    assert len(said.splitlines()) == 1
    with pytest.raises(UserError, match=r"'lr' is a key.*explain optim.lr"):
        explain("optim.lr.warm")
    with pytest.raises(UserError, match="did you mean 'lr'"):
        explain("optim.lrr")


@pytest.mark.parametrize(("section", "fragment"), [("optmi", "did you mean 'optim'"), ("data.clop", "'clip'")])
def test_a_section_that_is_none_names_the_nearest(section: str, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        explain(section)


def test_types_choices_and_bounds_are_told() -> None:
    assert "zero_stage  [default 'auto'; auto | 0 | 1 | 2 | 3]" in explain("engine")
    assert "size  [default 112; int >= 16 <= 1024]" in explain("data.clip")
    assert "; list of str]" in explain("data.clip")
    assert "; mapping of str, list or mapping]" in explain("search")
