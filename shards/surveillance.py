"""Surveillance Camera Fights (Akti et al. 2019): 300 clips of 2 s, half of them fights.

python shards/surveillance.py /data/fight-detection-surv-dataset surveillance.csv --fold 1

Below the folder: fight/fiNNN.mp4 and noFight/nofiNNN.mp4. More fights than others have a sound track: a model that sees
which modalities are there knows something already.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from folds import Fold, numbered
from manifest_of import Out, Pack, PackSettings, Root, Video, files_below, finish, folder, run

SETTINGS = PackSettings(seconds=2.0)


def videos(root: Path, fold: int = 1) -> Iterator[Video]:
    """Yields all videos with one of five folds as the test split; see `folds` for what a group is.

    Raises:
        UserError: a folder is missing, or there are no such videos.
    """
    for name, stem, label in (("fight", "fi", "fight"), ("noFight", "nofi", "nofight")):
        yield from numbered(files_below(folder(root, name)), rf"{stem}(\d+)\.mp4", label, fold)


def main(root: Root, out: Out, fold: Fold = 1, pack: Pack = "") -> None:
    """Write the manifest of Surveillance Camera Fights."""
    finish(videos(root, fold), out, SETTINGS, pack)


if __name__ == "__main__":
    run(main)
