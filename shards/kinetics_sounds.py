"""Kinetics-Sounds (Arandjelovic & Zisserman 2017): the classes of Kinetics that can be seen and heard.

python shards/kinetics_sounds.py /data/kinetics400 kinetics-sounds.csv

The folder is that of Kinetics-400, see kinetics.py, with test.csv and test/ besides. Of the 34 classes of the paper, 31
are in the released Kinetics-400; others count 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kinetics import listed
from manifest_of import AsPublished, Out, Pack, PackSettings, Root, Video, finish, run

SETTINGS = PackSettings(seconds=10.0, skip_bad=True)
CLASSES = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing",
    "mowing lawn", "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet",
    "playing drums", "playing guitar", "playing harmonica", "playing keyboard", "playing organ", "playing piano",
    "playing saxophone", "playing trombone", "playing trumpet", "playing violin", "playing xylophone",
    "ripping paper", "shoveling snow", "shuffling cards", "singing", "stomping grapes", "tap dancing",
    "tapping guitar", "tapping pen", "tickling",
)  # fmt: skip


def videos(root: Path) -> Iterator[Video]:
    """Yields the videos of all three official lists; the group is the YouTube video.

    Raises:
        UserError: a list or folder is missing, or a list has other columns.
    """
    for split in ("train", "val", "test"):
        yield from listed(root, split, split, CLASSES)


def main(root: Root, out: Out, pack: Pack = "", as_published: AsPublished = False) -> None:
    """Write the manifest of Kinetics-Sounds."""
    finish(videos(root), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
