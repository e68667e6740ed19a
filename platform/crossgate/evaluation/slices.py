"""Parts of an evaluation set that a mean hides: each class, and the clips that lack or have degraded a modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.evaluation.predictions import Predictions


def slices(predictions: Predictions, task: str, classes: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Returns name -> ``(N,)`` mask of the slices that have clips.

    Args:
        predictions: clips with a label of the task.
        task: label name.
        classes: names in the order of the labels.
    """
    labels: NDArray[Any] = predictions.labels[task]
    found = {f"class {name}": labels == k for k, name in enumerate(classes)}
    for m, name in enumerate(predictions.modalities):
        found[f"without {name}"] = ~predictions.present[:, m]
        found[f"degraded {name}"] = np.nan_to_num(predictions.degraded[:, m]) > 0
    return {name: rows for name, rows in found.items() if rows.any()}
