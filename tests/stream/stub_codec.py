"""A codec that worker processes can import: a clip is the number in its ``rgb.bin``."""

from __future__ import annotations

import os
import signal

import torch

from crossgate.stream import schedule


def number_tensors(members, clip, augment, seed):
    """Decodes ``rgb.bin`` (decimal text) and, if there, ``audio.bin``; `augment` adds the seed to the picture."""
    value = int(members["rgb.bin"])
    rgb = torch.full(clip.shape("rgb"), value % 251, dtype=torch.uint8)
    if augment is not None:
        rgb[..., 0] = seed % 251
    found = {"rgb": rgb}
    if "audio.bin" in members and "audio" in clip.modalities:
        found["audio"] = torch.full(clip.shape("audio"), float(members["audio.bin"]))
    return found


class LanesCodec:
    """`number_tensors`, which sets in worker processes from how many clips on a corpus is read in lanes."""

    def __init__(self, mixed: int) -> None:
        self.mixed = mixed

    def __call__(self, members, clip, augment, seed):
        return number_tensors(members, clip, augment, seed)

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        schedule.MIXED = self.mixed


def deadly_tensors(members, clip, augment, seed):
    """Kills the process that decodes clip 9, as the kernel does when memory runs out."""
    if members["rgb.bin"] == b"9":
        os.kill(os.getpid(), signal.SIGKILL)
    return number_tensors(members, clip, augment, seed)


def interrupted_tensors(members, clip, augment, seed):
    """The same in the midst of a Ctrl-C, which a terminal sends to every process of the run."""
    os.kill(os.getpid(), signal.SIGINT)
    return number_tensors(members, clip, augment, seed)
