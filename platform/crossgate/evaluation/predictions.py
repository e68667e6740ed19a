"""What a model said about the clips of one split, as NumPy arrays: the input of everything in this room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class Predictions:
    """N clips of M modalities, K classes of the fine-tuned task.

    Attributes:
        modalities: names, length M; the order of every M axis.
        features: ``(N, M, D)`` encoder features, rows of absent modalities are meaningless.
        embeddings: ``(N, M, E)`` contrastive embeddings, None for a classifier.
        fused: ``(N, D)`` fused features.
        weights: ``(N, M)`` gate weights, None where the fusion has none.
        logits: ``(N, K)`` of the fused head, None for a pretrained model.
        unimodal_logits: ``(N, M, K)`` of each modality's own head, None for a pretrained model.
        present: ``(N, M)`` bool.
        group: ``(N,)`` int64 hash of the source video or subject.
        labels: task -> ``(N,)`` int64 class, -1 where the clip has no such label.
        degraded: ``(N, M)`` known severity in 0..1, NaN where nothing is known.
        keys: names of the clips, length N.
    """

    modalities: tuple[str, ...]
    features: Array
    embeddings: Array | None
    fused: Array
    weights: Array | None
    logits: Array | None
    unimodal_logits: Array | None
    present: Array
    group: Array
    labels: dict[str, Array]
    degraded: Array
    keys: list[str]

    def __len__(self) -> int:
        return len(self.group)

    def select(self, rows: Array) -> Predictions:
        """Returns the clips at `rows` (indices or a boolean mask)."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        chosen: dict[str, Any] = {"modalities": self.modalities, "keys": [self.keys[i] for i in rows]}
        for field in fields(self):
            if field.name not in chosen:
                chosen[field.name] = _map(getattr(self, field.name), lambda x: x[rows])
        return Predictions(**chosen)

    def labelled(self, task: str) -> Predictions:
        """Returns the clips that have a label of the task (none, if the split does not know the task)."""
        labels = self.labels.get(task)
        return self.select(np.zeros(len(self), dtype=bool) if labels is None else labels >= 0)

    def aligned(self, keys: Sequence[str]) -> Predictions:
        """Returns the clips in the order of `keys`.

        Raises:
            ValueError: when a key is missing here, since a paired comparison would then be none.
        """
        if self.keys == list(keys):
            return self
        where = {key: row for row, key in enumerate(self.keys)}
        missing = [key for key in keys if key not in where]
        if missing:
            raise ValueError(f"{len(missing)} clips have no prediction, the first is {missing[0]!r}")
        return self.select(np.array([where[key] for key in keys], dtype=np.int64))


def collect(pairs: Iterable[tuple[Any, Any]]) -> Predictions:
    """Concatenates `(ClipBatch, Prediction)` pairs of one split on the CPU; floats become float32.

    Raises:
        ValueError: when there is nothing to collect.
    """
    parts = [_part(batch, prediction) for batch, prediction in pairs]
    return concatenate(parts)


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Joins parts of one split, for example those of several ranks.

    Raises:
        ValueError: for no parts, or parts of different modalities.
    """
    if not parts:
        raise ValueError("no predictions: the split has no clips")
    if len({part.modalities for part in parts}) > 1:
        raise ValueError("the parts have different modalities")
    joined: dict[str, Any] = {
        "modalities": parts[0].modalities,
        "keys": [key for part in parts for key in part.keys],
        "labels": {
            task: np.concatenate([_labels(part, task) for part in parts])
            for task in sorted({task for part in parts for task in part.labels})
        },
    }
    for field in fields(Predictions):
        if field.name in joined:
            continue
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if any(v is None for v in values) else np.concatenate(values)
    return Predictions(**joined)


def _part(batch: Any, prediction: Any) -> Predictions:
    return Predictions(
        modalities=tuple(batch.modalities),
        features=_array(prediction.features),
        embeddings=_array(prediction.embeddings),
        fused=_array(prediction.fused),
        weights=_array(prediction.weights),
        logits=_array(prediction.logits),
        unimodal_logits=_array(prediction.unimodal_logits),
        present=_array(batch.present).astype(bool),
        group=_array(batch.group),
        labels={task: _array(labels) for task, labels in batch.labels.items()},
        degraded=_array(batch.degraded),
        keys=list(batch.keys) or [f"clip-{int(i)}" for i in _array(batch.clip)],
    )


def _array(x: Any) -> Any:
    """Tensor of any device and float type -> array; NumPy has no bfloat16, so floats pass through float32."""
    if x is None or isinstance(x, np.ndarray):
        return x
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x).numpy()


def _labels(part: Predictions, task: str) -> Array:
    return part.labels.get(task, np.full(len(part), -1, dtype=np.int64))


def _map(value: Any, function: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: function(x) for name, x in value.items()}
    return function(value)
