"""Hockey Fights (Bermejo Nievas et al. 2011): 1000 clips of ice hockey, half of them fights.

python shards/hockey.py /data/HockeyFights hockey.csv --fold 1

In the folder: fi1_xvid.avi to fi500_xvid.avi (fights) and no1_xvid.avi to no500_xvid.avi.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from folds import Fold, numbered
from manifest_of import Out, Pack, PackSettings, Root, Video, files_below, finish, run

SETTINGS = PackSettings(seconds=2.0)


def videos(root: Path, fold: int = 1) -> Iterator[Video]:
    """Yields all videos with one of five folds as the test split; see `folds` for what a group is.

    Raises:
        UserError: there are no such videos.
    """
    paths = files_below(root, ".avi")
    for name, label in (("fi", "fight"), ("no", "nofight")):
        yield from numbered(paths, rf"{name}(\d+)(?:_xvid)?\.avi", label, fold)


def main(root: Root, out: Out, fold: Fold = 1, pack: Pack = "") -> None:
    """Write the manifest of Hockey Fights."""
    finish(videos(root, fold), out, SETTINGS, pack)


if __name__ == "__main__":
    run(main)
