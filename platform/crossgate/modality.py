"""The modalities: names, tensor layout, units. A fifth one is one more entry here, a codec and an encoder default.

Every modality reaches the network as ``(B, T, C, H, W)``; ``C``, the unit and the standardisation stand here,
``T``, ``H`` and ``W`` come from the recipe (`config.ClipConfig.shape`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Modality:
    """One kind of stream that a clip may have.

    Attributes:
        name: the word used in recipes, indexes and metrics.
        channels: ``C`` of its tensor.
        layout: ``video`` is T frames of H x W; ``spectrogram`` is one frame, mel bins by time steps.
        unit: what a tensor value means.
        mean, std: per-channel standardisation ``(x - mean) / std``, applied by the encoder, so that a registered
            model carries it.
        backbone: default timm backbone.
    """

    name: str
    channels: int
    layout: Literal["video", "spectrogram"]
    unit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: str = "convnext_atto"


_ALL = (
    Modality(
        "rgb",
        channels=3,
        layout="video",
        unit="8-bit sRGB, 0 to 255",
        mean=(123.675, 116.28, 103.53),  # ImageNet, as timm's pretrained weights expect
        std=(58.395, 57.12, 57.375),
    ),
    Modality(
        "flow",
        channels=2,
        layout="video",
        unit="short sides of the picture a second, u to the right, v down",  # free of resolution and frame rate
        mean=(0.0, 0.0),
        std=(0.2, 0.2),
    ),
    Modality(
        "audio",
        channels=1,
        layout="spectrogram",
        unit="natural log of mel power, 16 kHz mono, 25 ms Hann window, 10 ms hop",
        mean=(-3.5,),
        std=(3.0,),
    ),
    Modality(
        "depth",
        channels=1,
        layout="video",
        unit="metres, 0 where there is no measurement",
        mean=(4.0,),
        std=(2.5,),
    ),
)

MODALITIES: dict[str, Modality] = {modality.name: modality for modality in _ALL}


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names in the order of `MODALITIES`, which is the order of every ``M`` axis.

    Raises:
        KeyError: for a name that is no modality.
    """
    names = set(names)
    unknown = names - MODALITIES.keys()
    if unknown:
        raise KeyError(sorted(unknown)[0])
    return tuple(name for name in MODALITIES if name in names)
