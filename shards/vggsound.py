"""VGGSound (Chen et al. 2020): 309 classes of sound whose source is in the picture, clips of 10 s of YouTube videos.

python shards/vggsound.py /data/VGGSound vggsound.csv

Below the folder: vggsound.csv (YouTube ID, start second, label, train or test; no header) and ID_SSSSSS.mp4 anywhere.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from manifest_of import AsPublished, Out, Pack, PackSettings, Root, UserError, Video, files_below, finish, lines_of, run

SETTINGS = PackSettings(seconds=10.0, skip_bad=True)


def videos(root: Path) -> Iterator[Video]:
    """Yields the videos of the official list; the group is the YouTube video.

    Raises:
        UserError: the list is missing or of another form, or there are no videos.
    """
    path = root / "vggsound.csv"
    lines = lines_of(path)
    there = {file.stem: file for file in files_below(root)}
    for number, row in enumerate(csv.reader(lines), start=1):
        if len(row) != 4 or not row[1].isdecimal() or row[3] not in ("train", "test"):
            raise UserError(f"line {number} is not understood", where=path, expected="ID,second,label,train or test")
        name, start, label, split = row
        stem = f"{name}_{int(start):06d}"
        yield Video(there.get(stem, root / f"{stem}.mp4"), split, name, {"action": label})


def main(root: Root, out: Out, pack: Pack = "", as_published: AsPublished = False) -> None:
    """Write the manifest of VGGSound."""
    finish(videos(root), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
