"""Folds for data sets without an official split, whose clips are numbered as they were cut.

Neighbours are mostly cut from one video, which no file name tells: a fold takes consecutive numbers of each class, and
ten of them count as a group. Both are stand-ins for the sources, which nobody published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from manifest_of import UserError, Video

FOLDS = 5

Fold = Annotated[int, typer.Option(help=f"Which of the {FOLDS} folds is the test split.", min=1, max=FOLDS)]


def numbered(paths: list[Path], pattern: str, label: str, fold: int) -> Iterator[Video]:
    """Yields the clips of one class: the `fold`-th of five runs of numbers is `test`, the rest `train`.

    Args:
        paths: of the clips.
        pattern: of a file name, with the number as its one group; other files are passed over.
        label: class of `violence`.
        fold: 1 to 5.

    Raises:
        UserError: fewer clips than folds.
    """
    clips = sorted((int(found[1]), path) for path in paths if (found := re.fullmatch(pattern, path.name)))
    if len(clips) < FOLDS:
        where = paths[0].parent if paths else None
        raise UserError(f"{len(clips)} clips of '{label}'", where=where, expected=f"{FOLDS} or more, named {pattern}")
    for place, (number, path) in enumerate(clips):
        tens = (number - 1) // 10
        split = "test" if place * FOLDS // len(clips) + 1 == fold else "train"
        yield Video(path, split, f"{label} {tens * 10 + 1}-{tens * 10 + 10}", {"violence": label})
