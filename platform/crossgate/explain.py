"""The recipe's settings as text, out of the docstrings of `config`."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from crossgate.config import Recipe
from crossgate.errors import UserError, nearest


def explain(section: str = "") -> str:
    """Returns the settings of a dotted section, or one key's (empty: the sections), with types, defaults and docs.

    Raises:
        UserError: for a section that is none, naming the nearest.
    """
    if section == "fusion":
        return _fusions()
    model: type[BaseModel] = Recipe
    parts = section.split(".") if section else []
    for depth, part in enumerate(parts, start=1):
        field = model.model_fields.get(part)
        if field is None:
            raise UserError(f"no section or key '{part}'", where=section, cure=nearest(part, model.model_fields))
        inner = _inner(field)
        if inner is None and depth < len(parts):
            raise UserError(
                f"'{part}' is a key, not a section", where=section, cure=f"crossgate explain {'.'.join(parts[:depth])}"
            )
        if inner is None:
            return _line(section, field).strip()
        model = inner
    title = f"{section}: {(model.__doc__ or '').strip()}" if section else "A recipe's sections and keys"
    sections = [".".join([*parts, name]) for name, field in model.model_fields.items() if _inner(field)]
    hint = f"(the keys of a section: crossgate explain {sections[0]})" if sections else ""
    return "\n".join([title, hint, *(_line(name, field) for name, field in model.model_fields.items())])


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument
    return None


def _line(name: str, field: FieldInfo) -> str:
    about = " ".join((field.description or "").split())
    if _inner(field):
        return f"  {name}:  {about}"
    default = "required" if field.is_required() else f"default {field.default!r}"
    return f"  {name}  [{default}; {_type(field)}]  {about}"


def _type(field: FieldInfo) -> str:
    """Returns the type or the choices of a setting, with its bounds."""
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    kind = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else _generic(annotation)
    return " ".join([kind, *(words for bound in field.metadata if (words := _bound(bound)))])


def _generic(annotation: Any) -> str:
    """Returns a container's type in words: ``list of str``, ``mapping of str, list or mapping``."""
    inner = get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_generic(part) for part in inner if part is not type(None)))
    if get_origin(annotation) is Annotated:
        return _generic(inner[0])
    if not inner:
        return str(getattr(annotation, "__name__", annotation))
    names = ", ".join(_generic(part) for part in inner if part is not Ellipsis)
    outer = get_origin(annotation)
    return f"{'list' if outer in (list, tuple) else 'mapping' if outer is dict else outer} of {names}"


def _bound(bound: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " ".join(f"{sign} {getattr(bound, name)}" for name, sign in signs.items() if hasattr(bound, name))


def _fusions() -> str:
    from crossgate.model.fusion import FUSIONS

    lines = [f"  {name:24} {(kind.__doc__ or '').strip().splitlines()[0]}" for name, kind in sorted(FUSIONS.items())]
    return "\n".join(["Values of model.fusion.name", "", *lines])
