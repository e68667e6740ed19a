"""UCF101 (Soomro et al. 2012): 101 actions, 25 groups a class, three official splits.

python shards/ucf101.py /data/UCF101 ucf101.csv --split 1

Below the folder: UCF-101/CLASS/v_CLASS_gNN_cNN.avi and ucfTrainTestlist/{trainlist,testlist}0N.txt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from manifest_of import AsPublished, Out, Pack, PackSettings, Root, Video, finish, folder, lines_of, matched, run

SETTINGS = PackSettings(seconds=2.0)


def videos(root: Path, split: int = 1) -> Iterator[Video]:
    """Yields the videos of an official split; the group is the class with its gNN, as the authors cut them.

    Raises:
        UserError: a folder or list is missing, or a line is of another form.
    """
    clips = folder(root, "UCF-101")
    for side in ("train", "test"):
        path = root / "ucfTrainTestlist" / f"{side}list{split:02d}.txt"
        for line in lines_of(path):
            name = line.split()[0]  # training lists add the class number
            found = matched(r"(\w+)/v_(\w+_g\d+)_c\d+\.avi", name, path, "CLASS/v_CLASS_gNN_cNN.avi")
            yield Video(clips / name, side, found[2], {"action": found[1]})


def main(
    root: Root,
    out: Out,
    split: Annotated[int, typer.Option(help="Official split.", min=1, max=3)] = 1,
    pack: Pack = "",
    as_published: AsPublished = False,
) -> None:
    """Write the manifest of UCF101."""
    finish(videos(root, split), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
