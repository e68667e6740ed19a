"""HMDB51 (Kuehne et al. 2011): 51 actions, three official splits of 70 training and 30 test videos a class.

python shards/hmdb51.py /data/HMDB51 hmdb51.csv --split 1

Below the folder: hmdb51_org/CLASS/NAME.avi and testTrainMulti_7030_splits/CLASS_test_splitN.txt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from manifest_of import (
    AsPublished,
    Out,
    Pack,
    PackSettings,
    Root,
    UserError,
    Video,
    finish,
    folder,
    lines_of,
    matched,
    run,
)

SETTINGS = PackSettings(seconds=2.0)
_SIDES = {"1": "train", "2": "test"}  # 0: in neither, so that both have as many videos a class
_HOW_SEEN = r"_[hulf]_(cm|nm)_np\d_(fr|ba|le|ri)_(bad|med|goo)_\d+"


def videos(root: Path, split: int = 1) -> Iterator[Video]:
    """Yields the videos of an official split; the group is the source video that the file is named after.

    Raises:
        UserError: a folder or list is missing, or a line is of another form.
    """
    clips, lists = folder(root, "hmdb51_org"), folder(root, "testTrainMulti_7030_splits")
    paths = sorted(lists.glob(f"*_test_split{split}.txt"))
    if not paths:
        raise UserError("no split files", where=lists, expected=f"CLASS_test_split{split}.txt, one a class")
    for path in paths:
        label = path.name.removesuffix(f"_test_split{split}.txt")
        for line in lines_of(path):
            found = matched(r"(.+\.avi)\s+([012])", line, path, "NAME.avi and 0, 1 or 2")
            if found[2] in _SIDES:
                yield Video(clips / label / found[1], _SIDES[found[2]], source(found[1], label), {"action": label})


def source(name: str, label: str) -> str:
    """Returns the title of the source video: what stands before class, view, quality and number."""
    found = re.fullmatch(f"(.+)_{re.escape(label)}{_HOW_SEEN}", Path(name).stem)
    return found[1] if found else Path(name).stem


def main(
    root: Root,
    out: Out,
    split: Annotated[int, typer.Option(help="Official split.", min=1, max=3)] = 1,
    pack: Pack = "",
    as_published: AsPublished = False,
) -> None:
    """Write the manifest of HMDB51."""
    finish(videos(root, split), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
