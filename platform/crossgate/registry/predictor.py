"""Videos in; labels, scores and gate weights out, one row a clip. All that a consumer of a model needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from crossgate.clips.extract import iter_clips
from crossgate.clips.tensors import clip_tensors
from crossgate.errors import UserError
from crossgate.model.classifier import Classifier
from crossgate.model.store import load_model
from crossgate.registry.sources import Settings, name_of, resolve

COLUMNS = ("source", "start_s", "label", "score", "scores", "weights", "modalities", "error")
Row = dict[str, Any]
_KEPT = 31 << 20  # bytes: glibc's threshold follows up to 32 MiB


class Predictor:
    """A fine-tuned model that takes videos.

    Args:
        model_dir: model directory, or a run directory that has one.
        settings: batch, bounds and permissions.

    Raises:
        UserError: no model there, or one that has no classes.
    """

    def __init__(self, model_dir: str | Path, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        model, self.card = load_model(model_dir)
        if not isinstance(model, Classifier):
            raise UserError(
                "a pretrained model has no classes to predict", where=model_dir, cure="fine-tune it: crossgate finetune"
            )
        _keep_freed_memory()
        self.device = torch.device(_device(self.settings.device))
        self.model = model.to(self.device)
        self.modalities = self.card.clip.modalities
        given = self.settings.threshold
        self.threshold = self.card.threshold if given is None else given

    def predict(self, items: Any, *, aggregate: bool | None = None) -> pd.DataFrame:
        """Scores videos; what is wrong with one of them becomes its row's error.

        Args:
            items: one or a list of: path, http(s) or s3 URL, bytes, base64 text, dict of ``source`` and optionally
                ``depth`` (a depth sensor's stream), ``depth_unit``, ``name``; or a DataFrame with such columns.
            aggregate: one row a video instead of one a clip (None: as in the settings).

        Returns:
            A row a clip, in the order of the items: ``source``; ``start_s``; ``label`` (of a task with a positive
            class: that one from the threshold on, else the other; of any other task the likeliest); ``score`` (the
            label's probability, below one half where the threshold is); ``scores`` (class -> probability);
            ``weights`` (modality -> gate weight, or None for a fusion without a gate); ``modalities`` that were
            there; ``error`` (None where there was none).

        Raises:
            UserError: more items than the settings allow.
        """
        rows: list[Row] = []
        waiting: list[tuple[Row, dict[str, Tensor]]] = []
        for row, tensors in self._clips(self._counted(as_items(items))):
            rows.append(row)
            if tensors is not None:
                waiting.append((row, tensors))
            if len(waiting) == self.settings.batch:
                self._score(waiting)
                waiting = []
        if waiting:
            self._score(waiting)
        if self.settings.aggregate if aggregate is None else aggregate:
            rows = self._aggregated(rows)
        # Objects, since pandas would turn a text column's None into NaN; by columns that share an index, which takes a
        # quarter of the time.
        index = pd.RangeIndex(len(rows))
        columns = {name: pd.Series([row[name] for row in rows], index, dtype=_kind(name)) for name in COLUMNS}
        return pd.DataFrame(columns, index)

    def score(self, tensors: dict[str, Tensor]) -> Row:
        """Returns the row of one clip that has been cut already (see `clips.tensors.clip_tensors`)."""
        row = _row(0, "", 0.0)
        self._score([(row, tensors)])
        return row

    def _counted(self, items: list[Any]) -> list[Any]:
        if len(items) > self.settings.items:
            expected = f"at most {self.settings.items}"
            raise UserError(f"{len(items)} videos at once", expected=expected, cure="ask for them in parts")
        return items

    def _clips(self, items: Iterable[Any]) -> Iterator[tuple[Row, dict[str, Tensor] | None]]:
        """Yields a row for each clip with its tensors, or for each failure without."""
        clip = self.card.clip
        for number, given in enumerate(items):
            start = 0.0
            try:
                item = resolve(given, self.settings)
                for raw in iter_clips(
                    item.video,
                    depth_source=item.depth if "depth" in self.modalities else None,
                    depth_unit=item.depth_unit,
                    seconds=clip.seconds,
                    short_side=self.settings.short_side or max(128, clip.size),
                    modalities=self.modalities,
                    limits=self.settings.limits,
                ):
                    start = raw.start
                    tensors = clip_tensors(raw, clip, None, 0)
                    if not tensors:
                        raise UserError("none of the model's modalities", expected=" or ".join(self.modalities))
                    yield _row(number, name_of(given), start), tensors
            except Exception as error:  # no video may fail the request that it came in
                yield _row(number, name_of(given), start, _reason(error)), None

    @torch.inference_mode()
    def _score(self, waiting: list[tuple[Row, dict[str, Tensor]]]) -> None:
        """Fills in the rows of one batch."""
        clips = [tensors for _, tensors in waiting]
        present = torch.tensor([[name in clip for name in self.modalities] for clip in clips])  # (B, M)
        streams = {name: self._stacked(name, clips) for name in self.modalities}
        output = self.model(streams, present.to(self.device))
        scores = output.logits.float().softmax(-1).cpu()  # (B, K)
        weights = None if output.weights is None else output.weights.float().cpu()  # (B, M)
        for b, (row, clip) in enumerate(waiting):
            row["scores"] = dict(zip(self.card.classes, scores[b].tolist()))
            row["weights"] = None if weights is None else dict(zip(self.modalities, weights[b].tolist()))
            row["modalities"] = [name for name in self.modalities if name in clip]
            self._decide(row)

    def _stacked(self, modality: str, clips: list[dict[str, Tensor]]) -> Tensor:
        """Returns ``(B, T, C, H, W)``; rows of clips without the modality are zeros that the mask hides."""
        dtype = torch.uint8 if modality == "rgb" else torch.float32
        stream = torch.zeros((len(clips), *self.card.clip.shape(modality)), dtype=dtype)
        for b, clip in enumerate(clips):
            if modality in clip:
                stream[b] = clip[modality]
        return stream.to(self.device)

    def _decide(self, row: Row) -> None:
        row["label"] = self.card.label_of(row["scores"], self.threshold)
        row["score"] = row["scores"][row["label"]]

    def _aggregated(self, rows: list[Row]) -> list[Row]:
        merged = []
        for number in dict.fromkeys(row["item"] for row in rows):
            own = [row for row in rows if row["item"] == number]
            good = [row for row in own if row["error"] is None]
            if good:
                row = dict(good[0])
                row["scores"] = _mean([clip["scores"] for clip in good])
                row["weights"] = None if row["weights"] is None else _mean([clip["weights"] for clip in good])
                row["modalities"] = [m for m in self.modalities if any(m in clip["modalities"] for clip in good)]
                row["error"] = next((clip["error"] for clip in own if clip["error"]), None)
                self._decide(row)
                merged.append(row)
            else:
                merged.append(own[0])
        return merged


def _keep_freed_memory() -> None:
    """Has the C library keep what a request frees for the next one, up to 64 MB.

    glibc returns large pieces to the system at once, and each request pays a thousand page faults to have them back,
    until it has seen one of that size freed: its thresholds follow (mallopt(3), M_MMAP_THRESHOLD). Elsewhere this does
    nothing.
    """
    np.empty(_KEPT, np.uint8)


def as_items(items: Any) -> list[Any]:
    """Returns the items of a request as a list, from whatever table or single value they came in."""
    if isinstance(items, pd.DataFrame):
        if len(items.columns) == 1:
            return items.iloc[:, 0].tolist()
        return items.to_dict(orient="records")
    if isinstance(items, str | bytes | bytearray | memoryview | dict | Path):
        return [items]
    return list(items)


def as_json(value: Any) -> Any:
    """Returns a value with nothing in it that JSON lacks: numpy's numbers as Python's, None for what is not finite."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, np.floating | np.integer | np.bool_):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(number: int, source: str, start: float, error: str | None = None) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    return {**row, "item": number, "source": source, "start_s": start, "score": float("nan"), "error": error}


def _kind(column: str) -> type:
    return float if column in ("start_s", "score") else object


def _mean(tables: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(table[key] for table in tables) / len(tables) for key in tables[0]}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
