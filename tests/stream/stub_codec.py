"""A codec that worker processes can import: a clip is the number in its ``rgb.bin``."""

from __future__ import annotations

import torch


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
