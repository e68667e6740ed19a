"""XD-Violence (Wu et al. 2020): 4754 untrimmed videos of films and YouTube with sound, six kinds of violence.

python shards/xd_violence.py /data/XD-Violence xd.csv

Below the folder: the 800 test videos in test_videos/ (see --test), the training videos in any other folders, all named
TITLE__#PIECE_label_CODES.mp4. Codes: A none, B1 fighting, B2 shooting, B4 riot, B5 abuse, B6 car accident, G explosion.

The labels are those of whole videos: every clip of a violent one counts as violent. annotations.txt, the frames of the
violence in test videos, is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from manifest_of import AsPublished, Out, Pack, PackSettings, Root, Video, files_below, finish, folder, matched, run

SETTINGS = PackSettings(seconds=5.0, skip_bad=True)


def videos(root: Path, test: str = "test_videos") -> Iterator[Video]:
    """Yields all videos; the group is the film or YouTube video before ``__#``, the codes are kept as `events`.

    Args:
        root: of the data set.
        test: folder of the test videos, below it.

    Raises:
        UserError: that folder is missing, or a name is of another form.
    """
    tested = folder(root, test)
    for path in files_below(root, ".mp4"):
        form = "TITLE__#PIECE_label_CODES.mp4"
        found = matched(r"(.+?)__#(.+)_label_([A-Z0-9-]+)\.mp4", path.name, path.parent, form)
        events = [code for code in found[3].split("-") if code != "0"]
        split = "test" if path.is_relative_to(tested) else "train"
        label = "normal" if events == ["A"] else "violent"
        yield Video(path, split, found[1], {"violence": label}, extra={"events": "-".join(events)})


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
