"""RWF-2000 (Cheng et al. 2021): 2000 clips of 5 s of surveillance cameras, fights and others.

python shards/rwf2000.py /data/RWF-2000 rwf2000.csv

Below the folder: {train,val}/{Fight,NonFight}/ID_N.avi.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from manifest_of import AsPublished, Out, Pack, PackSettings, Root, Video, files_below, finish, folder, run

SETTINGS = PackSettings(seconds=5.0)
_LABELS = {"Fight": "fight", "NonFight": "nofight"}


def videos(root: Path) -> Iterator[Video]:
    """Yields all videos; the group is the source video, whose name stands before the clip's number.

    Results are published on the 400 validation clips, so they become `test`; `val` is cut from training.

    Raises:
        UserError: a folder is missing or empty.
    """
    for official, split in (("train", "train"), ("val", "test")):
        for name, label in _LABELS.items():
            for path in files_below(folder(root, f"{official}/{name}")):
                yield Video(path, split, re.sub(r"_\d+$", "", path.stem), {"violence": label})


def main(root: Root, out: Out, pack: Pack = "", as_published: AsPublished = False) -> None:
    """Write the manifest of RWF-2000."""
    finish(videos(root), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
