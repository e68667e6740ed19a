"""XD-Violence (Wu et al. 2020): 4754 untrimmed videos of films and YouTube with sound, six kinds of violence.

python shards/xd_violence.py /data/XD-Violence xd.csv

Below the folder: the 800 test videos in test_videos/ (see --test), the training videos in any other folders, all named
TITLE__#PIECE_label_CODES.mp4. Codes: A none, B1 fighting, B2 shooting, B4 riot, B5 abuse, B6 car accident, G explosion.

The labels are those of whole videos: every clip of a violent one counts as violent. annotations.txt has the frames of
the violence in test videos, a line each: NAME FIRST LAST FIRST LAST...; they go with the clips, for frame-level scores.
"""

from __future__ import annotations

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
    Video,
    files_below,
    finish,
    folder,
    lines_of,
    matched,
    run,
)

from crossgate.clips.media import probe
from crossgate.errors import UserError

SETTINGS = PackSettings(seconds=5.0, skip_bad=True)


def videos(root: Path, test: str = "test_videos") -> Iterator[Video]:
    """Yields all videos; the group is the film or YouTube video before ``__#``, the codes are kept as `events`.

    Args:
        root: of the data set.
        test: folder of the test videos, below it.

    Raises:
        UserError: that folder or annotations.txt is missing, or a name or line is of another form.
    """
    tested = folder(root, test)
    annotated = annotations(root / "annotations.txt")
    for path in files_below(root, ".mp4"):
        form = "TITLE__#PIECE_label_CODES.mp4"
        found = matched(r"(.+?)__#(.+)_label_([A-Z0-9-]+)\.mp4", path.name, path.parent, form)
        events = [code for code in found[3].split("-") if code != "0"]
        split = "test" if path.is_relative_to(tested) else "train"
        label = "normal" if events == ["A"] else "violent"
        extra = {"events": "-".join(events)}
        if split == "test":
            extra |= frames_of(path, annotated, label)
        yield Video(path, split, found[1], {"violence": label}, extra=extra)


def annotations(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Returns name of a test video -> ``(first frame, frame after the last)`` of its violence.

    Raises:
        UserError: the file is missing, or a line is of another form.
    """
    found = {}
    for line in lines_of(path):
        name, *numbers = line.split()
        expected = "NAME and pairs of frames"
        matched(r"(\d+ \d+ ?)*", " ".join(numbers), path, expected)
        edges = list(map(int, numbers))
        found[name.removesuffix(".mp4")] = list(zip(edges[::2], edges[1::2]))
    return found


def frames_of(path: Path, annotated: dict[str, list[tuple[int, int]]], label: str) -> dict[str, str]:
    """Returns what a test video's clips need for frame-level scores: nothing for one that cannot be read.

    Raises:
        UserError: a violent video has no line in the annotations.
    """
    if label == "violent" and path.stem not in annotated:
        raise UserError("no line for this violent video in annotations.txt", where=path, cure="get the official file")
    try:
        info = probe(path)
    except UserError:
        return {}  # said, with its name, when it is packed
    events = annotated.get(path.stem, []) if label == "violent" else []
    return {
        "frame_rate": f"{info.fps:.6g}",
        "frames": str(round(info.seconds * info.fps)),
        "event_frames": " ".join(f"{first}-{after}" for first, after in events),
    }


def main(
    root: Root,
    out: Out,
    test: Annotated[str, typer.Option(help="Folder of the test videos.")] = "test_videos",
    pack: Pack = "",
    as_published: AsPublished = False,
) -> None:
    """Write the manifest of XD-Violence."""
    finish(videos(root, test), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
