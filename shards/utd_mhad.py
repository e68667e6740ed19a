"""UTD-MHAD (Chen et al. 2015): 27 actions of 8 subjects before a Kinect, with depth.

python shards/utd_mhad.py /data/UTD-MHAD utd.csv --depth /data/UTD-MHAD/depth_videos

Below the folder: aN_sN_tN_color.avi (in RGB/) and, for --depth, aN_sN_tN_depth.mat (in Depth/) with `d_depth` of
height, width, frames in millimetres. Skeletons and inertial sensors are not read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from depth_video import Depth, Recording, Workers, make_depth_videos
from manifest_of import AsPublished, Out, Pack, PackSettings, Root, UserError, Video, files_below, finish, matched, run
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

SETTINGS = PackSettings(seconds=4.0)
TRAINING_SUBJECTS = {1, 3, 5, 7}
"""Of the published protocol; the even ones are tested."""
ACTIONS = (
    "swipe left", "swipe right", "wave", "clap", "throw", "cross arms", "basketball shoot", "draw x",
    "draw circle clockwise", "draw circle counter-clockwise", "draw triangle", "bowling", "boxing", "baseball swing",
    "tennis swing", "arm curl", "tennis serve", "push", "knock", "catch", "pick up and throw", "jog", "walk",
    "sit to stand", "stand to sit", "lunge", "squat",
)  # fmt: skip


def videos(root: Path, depth: Path | None = None) -> Iterator[Video]:
    """Yields all videos; the group is the subject.

    Args:
        root: of the data set.
        depth: folder with the depth videos (None: no depth).

    Raises:
        UserError: there are no videos, or a name is of another form.
    """
    for path in files_below(root, "_color.avi"):
        form = f"aN_sN_tN_color.avi with N of a from 1 to {len(ACTIONS)}"
        found = matched(r"a(0?[1-9]|1\d|2[0-7])_s(\d+)_t\d+_color\.avi", path.name, path.parent, form)
        subject = int(found[2])
        beside = depth / _depth_name(path) if depth else None
        yield Video(
            path,
            "train" if subject in TRAINING_SUBJECTS else "test",
            f"subject {subject}",
            {"action": ACTIONS[int(found[1]) - 1]},
            depth=beside if beside and beside.is_file() else None,
        )


def recordings(root: Path, depth: Path) -> list[Recording]:
    """Returns the depth recordings of the videos that have one.

    Raises:
        UserError: there are none at all.
    """
    there = {path.name.removesuffix("_depth.mat"): path for path in files_below(root, "_depth.mat")}
    colours = {video.path.name.removesuffix("_color.avi"): video.path for video in videos(root)}
    both = [name for name in colours if name in there]
    return [Recording(there[name], colours[name], depth / _depth_name(colours[name])) for name in both]


def read_mat(source: Path) -> NDArray[np.uint16]:
    """Reads `d_depth` of a MATLAB file, brought from (H, W, F) to ``(F, H, W)``.

    Raises:
        UserError: it is no such file.
    """
    try:
        depth = loadmat(source, variable_names=["d_depth"])["d_depth"]
    except (MatReadError, zlib.error, KeyError, NotImplementedError, OSError, TypeError, ValueError) as error:
        expected = "a MATLAB 5 file with d_depth"
        raise UserError(f"no depth can be read ({error})", where=source, expected=expected) from None
    return np.moveaxis(depth, -1, 0).astype(np.uint16)


def _depth_name(colour: Path) -> str:
    return colour.name.replace("_color.avi", "_depth.mkv")


def main(
    root: Root, out: Out, depth: Depth = None, workers: Workers = 4, pack: Pack = "", as_published: AsPublished = False
) -> None:
    """Write the manifest of UTD-MHAD."""
    if depth:
        make_depth_videos(recordings(root, depth), read_mat, workers)
    finish(videos(root, depth), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
