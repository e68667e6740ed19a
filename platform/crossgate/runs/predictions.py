"""Runs a task over whole splits and brings the predictions of all ranks together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossgate.batch import ClipBatch
from crossgate.evaluation import Predictions, collect, concatenate
from crossgate.modality import MODALITIES
from crossgate.runs.context import Part, RunContext
from crossgate.stream.collate import BadClip
from crossgate.stream.index import Index
from crossgate.stream.loader import agreed_skips, sequential
from crossgate.stream.plan import EvaluationPlan
from crossgate.tasks.task import Prediction, Task

BATCH = 64
Array = NDArray[Any]


def predict_splits(task: Task, run: RunContext, part: Part, limit: int | None = None) -> Predictions | None:
    """Returns the task's predictions of every clip of a part of the data, on rank 0; None on other ranks.

    How many clips could not be decoded is noted in the run's `bad_clips`.

    Args:
        task: in any mode; predicts in evaluation mode.
        run: index, recipe and world.
        part: which splits: `data.train`, `data.val` or `data.test`, not empty.
        limit: at most so many clips.
    """
    skipped: list[BadClip] = []
    own = [collect([pair]) for pair in _pairs(task, run, part, limit, skipped)]  # clips are let go at once
    bad = agreed_skips(skipped, run.recipe.data, run.world.gather)
    parts = run.world.to_leader(concatenate(own) if own else None)
    if parts is None:
        return None
    run.bad_clips[part] = bad
    return concatenate([predictions for predictions in parts if predictions is not None])


def known_of(run: RunContext, part: Part, limit: int | None = None) -> Predictions:
    """Returns what the index itself knows of a part's clips: labels, groups, who has what. Nothing is decoded.

    Args:
        run: index and recipe.
        part: of the data, not empty.
        limit: at most so many clips, at equal distances.
    """
    index, modalities = run.index, run.recipe.data.clip.modalities
    columns = [list(MODALITIES).index(name) for name in modalities]
    selection = index.select(run.splits(part))
    taken = EvaluationPlan(selection, batch_size=selection.total, limit=limit)[0]
    shards = np.unique(taken.shards).tolist()
    return concatenate([_known(index, s, taken.rows[taken.shards == s], modalities, columns) for s in shards])


def _known(index: Index, shard: int, rows: Array, modalities: tuple[str, ...], columns: list[int]) -> Predictions:
    sidecar, count = index.sidecar(shard), len(rows)
    return Predictions(
        modalities=modalities,
        features=np.zeros((count, len(modalities), 0), np.float32),
        embeddings=None,
        fused=np.zeros((count, 0), np.float32),
        weights=None,
        logits=None,
        unimodal_logits=None,
        present=sidecar.present[rows][:, columns],
        group=sidecar.group[rows],
        labels={task: sidecar.label_ids(task, words)[rows] for task, words in index.vocabularies.items()},
        degraded=sidecar.degraded[rows][:, columns],
        keys=[sidecar.key(row) for row in rows.tolist()],
    )


def _pairs(
    task: Task, run: RunContext, part: Part, limit: int | None, skipped: list[BadClip]
) -> Iterator[tuple[ClipBatch, Prediction]]:
    world, kept = run.world, run.kept.get(part)
    if kept is not None:
        batches, total = _kept(kept, run, limit), len(kept)
    else:
        total = run.index.select(run.splits(part)).total
        batches = sequential(
            run.index,
            run.splits(part),
            run.recipe.data,
            batch_size=BATCH,
            rank=world.rank,
            ranks=world.ranks,
            limit=limit,
            skipped=skipped,
        )
    left = rounds(total, world.ranks, limit)
    for batch in batches:
        left -= 1
        yield batch, _on_host(task.predict(batch.to(world.device)))
    for _ in range(left):
        task.predict(_nothing(run).to(world.device))


def _kept(table: ClipBatch, run: RunContext, limit: int | None) -> Iterator[ClipBatch]:
    """This rank's share of kept features, cut as `stream.loader.sequential` cuts clips."""
    count = len(table) if limit is None else min(len(table), limit)
    rows = np.linspace(0, len(table), count, endpoint=False).astype(np.int64)
    own = np.array_split(rows, run.world.ranks)[run.world.rank]
    for start in range(0, len(own), BATCH):
        yield table.select(torch.from_numpy(own[start : start + BATCH]))


def rounds(clips: int, ranks: int, limit: int | None) -> int:
    """Returns the batches of the rank that has most of them.

    Every rank predicts as often: under ZeRO 3 each forward pass fetches weights from all ranks.
    """
    taken = clips if limit is None else min(clips, limit)
    return math.ceil(math.ceil(taken / ranks) / BATCH)


def _nothing(run: RunContext) -> ClipBatch:
    """One clip that has no modality and no label."""
    clip = run.recipe.data.clip
    count = len(clip.modalities)
    return ClipBatch(
        modalities=clip.modalities,
        streams={
            name: torch.zeros((1, *clip.shape(name)), dtype=torch.uint8 if name == "rgb" else torch.float32)
            for name in clip.modalities
        },
        present=torch.zeros((1, count), dtype=torch.bool),
        group=torch.zeros(1, dtype=torch.int64),
        labels={task: torch.full((1,), -1, dtype=torch.int64) for task in run.index.vocabularies},
        degraded=torch.full((1, count), torch.nan),
        clip=torch.zeros(1, dtype=torch.int64),
        keys=["nothing"],
    )


def _on_host(prediction: Prediction) -> Prediction:
    fields = {name: value for name, value in vars(prediction).items()}
    return Prediction(**{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
