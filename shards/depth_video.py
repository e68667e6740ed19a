"""Depth of a sensor as the packer reads it: a lossless 16-bit grey video beside the colour video, in millimetres."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import typer
from manifest_of import UserError
from numpy.typing import NDArray

from crossgate.clips.codec import encode_frames
from crossgate.clips.media import open_media, source_rate, video_stream
from crossgate.errors import writing
from crossgate.progress import progress_bar

Depth = Annotated[
    Path | None,
    typer.Option("--depth", help="Folder for the depth videos that are made from the official files (default: none)."),
]
Workers = Annotated[int, typer.Option(help="Depth videos that are made side by side.", min=1)]

Read = Callable[[Path], NDArray[np.uint16]]
"""Reads an official depth recording: ``(F, H, W)`` in millimetres, 0 where there is no measurement."""


@dataclass(frozen=True)
class Recording:
    """An official depth recording, the colour video that it belongs to, and the depth video to make of them."""

    source: Path
    colour: Path
    target: Path


def make_depth_videos(recordings: Sequence[Recording], read: Read, workers: int = 1) -> None:
    """Makes the depth videos that are not there yet; a made one is whole, so this may be killed and started again.

    Raises:
        UserError: a recording or its colour video cannot be read, or a depth video not be written.
    """
    todo = [one for one in recordings if not one.target.is_file()]
    with ThreadPoolExecutor(workers) as pool, progress_bar("depth videos") as step:  # decoders let go of the lock
        for done, _ in enumerate(pool.map(lambda one: _make(one, read), todo), start=1):
            step(done, len(todo))


def _make(recording: Recording, read: Read) -> None:
    depth = read(recording.source)
    if depth.ndim != 3 or not len(depth) or depth.dtype != np.uint16:
        raise UserError(
            f"depth of shape {depth.shape}, {depth.dtype}", where=recording.source, expected="16-bit F, H, W"
        )
    # The two cameras do not always deliver as many frames: both recordings last equally long.
    rate = len(depth) / duration(recording.colour)
    video = encode_frames(depth, rate, codec="ffv1", pixel_format="gray16le", options={}, container="matroska")
    target = recording.target
    beside = target.with_name(f".{target.name}.part")
    with writing("the depth video", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(video)
        os.replace(beside, target)


def duration(video: Path) -> float:
    """Returns the seconds of a video by its number of frames, else as its header says.

    Raises:
        UserError: it cannot be read, or says neither.
    """
    with open_media(video) as container:
        stream = video_stream(container, str(video))
        seconds = stream.frames / source_rate(stream) if stream.frames else (container.duration or 0) / av.time_base
    if seconds <= 0:
        raise UserError("its length is unknown", where=video, cure="replace or repair the file")
    return seconds
