"""Kinetics 400, 600, 700 and 700-2020 (Kay et al. 2017): clips of about 10 s of YouTube videos.

python shards/kinetics.py /data/kinetics400 kinetics.csv

Below the folder: train.csv and validate.csv (or val.csv; in annotations/ too) with the columns label, youtube_id,
time_start, time_end, and train/, val/ (or validate/) with ID_SSSSSS_EEEEEE.mp4, in folders of classes or not.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from pathlib import Path

from manifest_of import (
    AsPublished,
    Out,
    Pack,
    PackSettings,
    Root,
    UserError,
    Video,
    files_below,
    finish,
    folder,
    lines_of,
    run,
)

SETTINGS = PackSettings(seconds=2.0, skip_bad=True)
_NAMES = {"train": ("train",), "val": ("validate", "val", "validation"), "test": ("test",)}
_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def videos(root: Path) -> Iterator[Video]:
    """Yields the videos of both lists; the group is the YouTube video.

    Results are published on the validation split, so it becomes `test`; `val` is cut from training.

    Raises:
        UserError: a list or folder is missing, or a list has other columns.
    """
    yield from listed(root, "train", "train")
    yield from listed(root, "val", "test")


def listed(root: Path, official: str, split: str, classes: Collection[str] = ()) -> Iterator[Video]:
    """Yields the videos of one official list.

    Args:
        root: of the data set.
        official: split as Kinetics calls it: train, val or test.
        split: what it becomes.
        classes: only these (empty: all).
    """
    path = official_list(root, official)
    clips = folder(root, *_NAMES[official])
    there = {file.stem: file for file in files_below(clips)}
    rows = csv.DictReader(lines_of(path))
    absent = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
    if absent:
        raise UserError(f"no column '{absent[0]}'", where=path, expected=", ".join(_COLUMNS))
    for row in rows:
        if classes and row["label"] not in classes:
            continue
        try:
            stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except (TypeError, ValueError):
            raise UserError(f"times that are no whole seconds, line {rows.line_num}", where=path) from None
        place = there.get(stem, clips / f"{stem}.mp4")
        yield Video(place, split, row["youtube_id"], {"action": row["label"]})


def official_list(root: Path, official: str) -> Path:
    """Returns the path of an official list, the likeliest one where there is none."""
    places = [home / f"{name}.csv" for name in _NAMES[official] for home in (root, root / "annotations")]
    return next((path for path in places if path.is_file()), places[0])


def main(root: Root, out: Out, pack: Pack = "", as_published: AsPublished = False) -> None:
    """Write the manifest of Kinetics."""
    finish(videos(root), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
