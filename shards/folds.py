"""Folds for data sets without an official split, whose clips are numbered as they were cut.

Neighbours are mostly cut from one video, which no file name tells. So ten consecutive numbers of a class count as a
group, and consecutive groups as a fold: both are stand-ins for the sources, which nobody published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from manifest_of import UserError, Video

FOLDS = 5
TOGETHER = 10
"""Consecutive numbers that count as one source."""

Fold = Annotated[int, typer.Option(help=f"Which of the {FOLDS} folds is the test split.", min=1, max=FOLDS)]


def numbered(paths: list[Path], pattern: str, label: str, fold: int) -> Iterator[Video]:
    """Yields the clips of one class: the `fold`-th of five runs of groups is `test`, the rest `train`.

    Args:
        paths: of the clips.
        pattern: of a file name, with the number as its one group; other files are passed over.
        label: class of `violence`.
        fold: 1 to 5.

    Raises:
        UserError: fewer groups than folds.
    """
    clips = sorted((int(found[1]), path) for path in paths if (found := re.fullmatch(pattern, path.name)))
    tens = sorted({(number - 1) // TOGETHER for number, _ in clips})
    if len(tens) < FOLDS:
        where = paths[0].parent if paths else None
        expected = f"{FOLDS} times {TOGETHER} or more, named {pattern}"
        raise UserError(f"{len(clips)} clips of '{label}'", where=where, expected=expected)
    tested = {ten for place, ten in enumerate(tens) if place * FOLDS // len(tens) + 1 == fold}
    for number, path in clips:
        ten = (number - 1) // TOGETHER
        group = f"{label} {ten * TOGETHER + 1}-{(ten + 1) * TOGETHER}"
        yield Video(path, "test" if ten in tested else "train", group, {"violence": label})
