"""Depth: from a sensor's 16-bit stream beside the video, or estimated from its pictures by a plugged-in model.

Estimated depth is marked as such wherever it goes: it says nothing that the pictures did not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.errors import UserError

MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "relative_8bit": 10_000 / 255}
"""Depth unit of a manifest -> millimetres. Without a known scale 255 counts as 10 m: an order, no distance."""

Estimator = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""``(F, H, W, 3)`` uint8 RGB -> ``(F, H, W)`` metres, 0 where there is none."""


def to_millimetres(depth: NDArray[np.uint16], unit: str, where: object = None) -> NDArray[np.uint16]:
    """Returns sensor depth in millimetres; what exceeds 16 bits becomes 0, no measurement.

    Raises:
        UserError: unknown unit.
    """
    if unit not in MILLIMETRES:
        raise UserError(f"unknown depth unit '{unit}'", where=where, expected=" or ".join(MILLIMETRES))
    if unit == "mm":
        return depth
    scaled = depth * MILLIMETRES[unit]
    return np.where(scaled > 65535, 0, scaled).astype(np.uint16)


def estimate(estimator: Estimator, rgb: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Returns ``(F, H, W)`` estimated depth in millimetres.

    Raises:
        UserError: the estimator returned another shape.
    """
    metres = np.asarray(estimator(rgb), np.float32)
    if metres.shape != rgb.shape[:3]:
        raise UserError(f"the depth estimator returned {metres.shape}", expected=str(rgb.shape[:3]))
    return np.clip(np.nan_to_num(metres) * 1000, 0, 65535).astype(np.uint16)


def load_estimator(name: str) -> Estimator | None:
    """Returns the estimator of a name: ``transformers:MODEL`` or ``package.module:function``; None for no name.

    Raises:
        UserError: it cannot be imported.
    """
    if not name:
        return None
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError("not an estimator", where=name, expected="transformers:MODEL or package.module:function")
    if module == "transformers":
        return TransformersDepth(attribute)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"no such depth estimator ({error})", where=name) from None


class TransformersDepth:
    """A `transformers` depth-estimation pipeline.

    Metric models are used as they are. Relative ones predict inverse depth without a scale; a clip's range of it is
    laid over 1 to 10 m, which keeps the order of things and nothing more.
    """

    def __init__(self, model: str) -> None:
        try:
            from transformers import pipeline
        except ImportError:
            raise UserError(
                "depth estimation needs transformers", where=model, cure="pip install 'crossgate[depth]'"
            ) from None
        try:
            self._pipeline = pipeline("depth-estimation", model=model)
        except Exception as error:  # its hub client raises many kinds
            raise UserError(f"the depth model cannot be loaded ({error})", where=model) from None
        config = self._pipeline.model.config
        self._metric = getattr(config, "depth_estimation_type", "") == "metric" or "zoe" in config.model_type

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        import cv2
        from PIL import Image

        size = (rgb.shape[2], rgb.shape[1])
        predictions = [self._pipeline(Image.fromarray(picture))["predicted_depth"] for picture in rgb]
        depth = np.stack([cv2.resize(p.squeeze().float().cpu().numpy(), size) for p in predictions])
        if self._metric:
            return depth
        low, high = float(depth.min()), float(depth.max())
        return (1 / (0.1 + 0.9 * (depth - low) / max(high - low, 1e-6))).astype(np.float32)
