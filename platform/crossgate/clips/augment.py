"""What is drawn once for a clip and applied alike to all its modalities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossgate.config import AugmentConfig


@dataclass(frozen=True)
class View:
    """How a clip is looked at. The default is that of evaluation: the middle, unchanged.

    Attributes:
        start: place of the time window in a clip longer than it, 0 (first) to 1 (last).
        moments: ``(T,)`` place of each frame in its segment of time, 0 to 1.
        side: side of the square crop as a share of the picture's short side.
        x, y: place of the crop, 0 (left, top) to 1 (right, bottom).
        flip: mirror left and right.
        gains: ``(3,)`` factors of the colour channels.
        contrast: factor of the distance to mid grey.
        loudness: factor of the sound's amplitude.
        masks: ``(first, length)`` of the masked mel bins and of the masked time steps, as shares.
    """

    moments: NDArray[np.float64]
    start: float = 0.5
    side: float = 1.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    contrast: float = 1.0
    loudness: float = 1.0
    masks: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))

    def frames(self, available: int, window: float) -> NDArray[np.int64]:
        """Returns ``(T,)`` ascending frame numbers, one from each of T equal segments of the window.

        Args:
            available: frames of the clip.
            window: frames of the window; a shorter clip is used whole.
        """
        length = min(float(available), window)
        begin = self.start * (available - length)
        places = begin + (np.arange(len(self.moments)) + self.moments) * length / len(self.moments)
        return np.clip(places.astype(np.int64), 0, available - 1)

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns ``(top, bottom, left, right)`` in pixels of a picture of any resolution."""
        side = max(1, round(self.side * min(height, width)))
        top, left = round(self.y * (height - side)), round(self.x * (width - side))
        return top, top + side, left, left + side

    @property
    def recoloured(self) -> bool:
        """Whether rgb values change."""
        return self.contrast != 1.0 or self.gains != (1.0, 1.0, 1.0)

    def colours(self) -> NDArray[np.uint8]:
        """Returns ``(256, 3)``, what becomes of each value of each channel."""
        levels = (np.arange(256)[:, None] - 127.5) * self.contrast + 127.5
        return np.clip(np.rint(levels * np.array(self.gains)), 0, 255).astype(np.uint8)


def draw_view(frames: int, augment: AugmentConfig | None, seed: int) -> View:
    """Returns how to look at a clip: the middle view without augmentation, else one that the seed alone decides.

    Args:
        frames: T.
        augment: None or not enabled: no augmentation.
        seed: of this clip in this epoch.
    """
    if augment is None or not augment.enabled:
        return View(np.full(frames, 0.5))
    # Always the same number of draws, so that no setting shifts the luck of another.
    u = np.random.default_rng(seed & (2**63 - 1)).random(15 + frames)
    share = augment.crop + (1 - augment.crop) * u[0]
    common = 1 + augment.jitter * (2 * u[4] - 1)
    colour = common * (1 + 0.5 * augment.jitter * (2 * u[5:8] - 1))
    spans = augment.mask_audio * u[9:11]
    return View(
        moments=u[15:] if augment.time else np.full(frames, 0.5),
        start=float(u[3]) if augment.time else 0.5,
        side=float(np.sqrt(share)),
        x=float(u[1]) if augment.crop < 1 else 0.5,
        y=float(u[2]) if augment.crop < 1 else 0.5,
        flip=bool(u[12] < augment.flip),
        gains=(float(colour[0]), float(colour[1]), float(colour[2])),
        contrast=float(1 + augment.jitter * (2 * u[8] - 1)),
        loudness=float(np.exp(4 * augment.jitter * (u[13] - 0.5))),
        masks=((float(u[11] * (1 - spans[0])), float(spans[0])), (float(u[14] * (1 - spans[1])), float(spans[1]))),
    )
