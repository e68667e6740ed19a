"""YAML files of people: no key twice in one mapping, and a line that says where a file cannot be understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from crossgate.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two equal keys without a word, made to refuse the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping; what a merge (`<<`) brings may be set again."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if key.value in seen:
                problem = f"key '{key.value}' is in line {seen[key.value]} already; remove one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, expected: str, cure: str) -> dict[str, Any]:
    """Returns the mapping of a YAML file.

    Args:
        path: of the file.
        what: it is.
        expected: what it should hold.
        cure: for a file that is not there.

    Raises:
        UserError: for a file that cannot be read, is no YAML (with the line), or holds a key twice or no mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except FileNotFoundError:
        raise UserError(f"no such {what}", where=path, cure=cure) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path, expected="a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"is no text (byte {error.start} is not UTF-8)", where=path, expected=expected) from None
    except yaml.YAMLError as error:
        raise _explained(error, path) from None
    if not isinstance(tree, dict):
        raise UserError("holds no mapping", where=path, expected=expected)
    return tree


def _explained(error: yaml.YAMLError, path: Path) -> UserError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    where = f"{path}, line {mark.line + 1}" if mark else path
    if isinstance(error, yaml.constructor.ConstructorError):
        return UserError(problem, where=where)
    lines = "lines `key: value`, those of a section indented alike, by spaces"
    return UserError(f"cannot be read as YAML ({problem})", where=where, expected=lines)
