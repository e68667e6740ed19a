"""NTU RGB+D (Shahroudy et al. 2016): 60 actions of 40 subjects before three Kinects, with depth.

python shards/ntu_rgbd.py /data/nturgbd ntu.csv --depth /data/nturgbd/depth_videos

Below the folder: nturgb+d_rgb/SxxxCxxxPxxxRxxxAxxx_rgb.avi, and for --depth nturgb+d_depth_masked/SxxxCxxxPxxxRxxxAxxx/
MDepth-NNNNNNNN.png (or nturgb+d_depth/.../Depth-NNNNNNNN.png), 16 bits, millimetres. The two cameras of a Kinect see
the scene from places a hand apart: depth is on the clock of the colours, not pixel by pixel on them. Skeletons and
infrared are not read, nor the setups and actions that NTU RGB+D 120 adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
import typer
from depth_video import Depth, Recording, Workers, make_depth_videos
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
    matched,
    run,
)
from numpy.typing import NDArray

SETTINGS = PackSettings(seconds=4.0)
TRAINING_SUBJECTS = {1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38}
"""Of the official cross-subject protocol; the other twenty are tested."""
TRAINING_CAMERAS = {2, 3}
"""Of the official cross-view protocol; camera 1 is tested."""
ACTIONS = (
    "drink water", "eat meal", "brush teeth", "brush hair", "drop", "pick up", "throw", "sit down", "stand up",
    "clap", "read", "write", "tear up paper", "put on jacket", "take off jacket", "put on shoe", "take off shoe",
    "put on glasses", "take off glasses", "put on hat", "take off hat", "cheer up", "wave hand", "kick something",
    "reach into pocket", "hop", "jump up", "phone call", "play with phone", "type on keyboard", "point to something",
    "take selfie", "check time", "rub hands", "nod", "shake head", "wipe face", "salute", "put palms together",
    "cross hands in front", "sneeze", "stagger", "fall", "touch head", "touch chest", "touch back", "touch neck",
    "nausea", "fan self", "punch other", "kick other", "push other", "pat other's back", "point at other",
    "hug other", "give to other", "touch other's pocket", "shake hands", "walk towards", "walk apart",
)  # fmt: skip
"""A001 to A060, in short."""
FIGHTS = {50, 51, 52}
"""Actions that count as fights; the other actions between two people (A053 to A060) are `nofight`, the rest unlabelled.
No official task, but a test of violence with real depth."""


def videos(root: Path, protocol: Literal["subject", "view"] = "subject", depth: Path | None = None) -> Iterator[Video]:
    """Yields the videos of NTU RGB+D 60; the group is the subject.

    Under `view` every subject is on both sides: it needs --as-published.

    Args:
        root: of the data set.
        protocol: official split by subject or by camera.
        depth: folder with the depth videos (None: no depth).

    Raises:
        UserError: a folder is missing, or a name is of another form.
    """
    for path in files_below(folder(root, "nturgb+d_rgb")):
        form = "SxxxCxxxPxxxRxxxAxxx_rgb.avi"
        found = matched(r"(S(\d{3})C(\d{3})P(\d{3})R\d{3}A(\d{3}))_rgb\.avi", path.name, path.parent, form)
        setup, camera, subject, action = (int(found[number]) for number in (2, 3, 4, 5))
        if setup > 17 or not 1 <= action <= len(ACTIONS):
            continue
        training = subject in TRAINING_SUBJECTS if protocol == "subject" else camera in TRAINING_CAMERAS
        beside = depth / f"{found[1]}.mkv" if depth else None
        yield Video(
            path,
            "train" if training else "test",
            f"P{subject:03d}",
            {"action": ACTIONS[action - 1]} | ({"violence": _violence(action)} if action >= 50 else {}),
            depth=beside if beside and beside.is_file() else None,
        )


def recordings(root: Path, depth: Path) -> list[Recording]:
    """Returns the depth recordings of the videos that have one.

    Raises:
        UserError: there is no folder of depth maps.
    """
    maps = folder(root, "nturgb+d_depth_masked", "nturgb+d_depth")
    names = {video.path: video.path.name.removesuffix("_rgb.avi") for video in videos(root)}
    there = {path: name for path, name in names.items() if (maps / name).is_dir()}
    return [Recording(maps / name, path, depth / f"{name}.mkv") for path, name in there.items()]


def read_maps(source: Path) -> NDArray[np.uint16]:
    """Reads the depth maps of a recording in their order.

    Raises:
        UserError: there are none, or one is no 16-bit PNG of the size of the others.
    """
    pictures: list[NDArray[np.uint16]] = []
    for path in sorted(source.glob("*Depth-*.png")):
        picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if picture is None or picture.dtype != np.uint16 or pictures and picture.shape != pictures[0].shape:
            raise UserError("not a depth map", where=path, expected="a 16-bit grey PNG, all of one size")
        pictures.append(picture.astype(np.uint16, copy=False))
    if not pictures:
        raise UserError("no depth maps", where=source, expected="MDepth-NNNNNNNN.png")
    return np.stack(pictures)


def _violence(action: int) -> str:
    return "fight" if action in FIGHTS else "nofight"


def main(
    root: Root,
    out: Out,
    protocol: Annotated[Literal["subject", "view"], typer.Option(help="Official protocol.")] = "subject",
    depth: Depth = None,
    workers: Workers = 4,
    pack: Pack = "",
    as_published: AsPublished = False,
) -> None:
    """Write the manifest of NTU RGB+D."""
    if depth:
        make_depth_videos(recordings(root, depth), read_maps, workers)
    finish(videos(root, protocol, depth), out, SETTINGS, pack, as_published)


if __name__ == "__main__":
    run(main)
