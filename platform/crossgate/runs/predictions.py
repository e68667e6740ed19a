"""Runs a task over whole splits and brings the predictions of all ranks together."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from crossgate.batch import ClipBatch
from crossgate.evaluation import Predictions, collect, concatenate
from crossgate.runs.context import RunContext
from crossgate.stream.loader import sequential
from crossgate.tasks.task import Prediction, Task

BATCH = 64


def predict_splits(
    task: Task, run: RunContext, splits: tuple[str, ...], limit: int | None = None
) -> Predictions | None:
    """Returns the task's predictions of every clip of the splits, on rank 0; None on other ranks.

    Args:
        task: in any mode; predicts in evaluation mode.
        run: index, recipe and world.
        splits: names in the index.
        limit: at most so many clips.
    """
    parts = run.world.to_leader(_own_part(task, run, splits, limit))
    found = [part for part in parts or [] if part is not None]
    return concatenate(found) if found else None


def _own_part(task: Task, run: RunContext, splits: tuple[str, ...], limit: int | None) -> Predictions | None:
    pairs = list(_pairs(task, run, splits, limit))
    return collect(pairs) if pairs else None


def _pairs(
    task: Task, run: RunContext, splits: tuple[str, ...], limit: int | None
) -> Iterator[tuple[ClipBatch, Prediction]]:
    world = run.world
    batches = sequential(
        run.index, splits, run.recipe.data, batch_size=BATCH, rank=world.rank, ranks=world.ranks, limit=limit
    )
    for batch in batches:
        yield batch, _on_host(task.predict(batch.to(world.device)))


def _on_host(prediction: Prediction) -> Prediction:
    fields = {name: value for name, value in vars(prediction).items()}
    return Prediction(**{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
