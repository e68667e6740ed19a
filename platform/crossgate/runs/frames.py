"""Where the clips of untrimmed videos lie, out of the notes that the packer left with each clip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from crossgate.errors import UserError
from crossgate.evaluation import positive_class
from crossgate.evaluation.frames import Span
from crossgate.runs.context import RunContext

_AT_ONCE = 256


def check_frames(run: RunContext) -> None:
    """Checks before a run with `evaluation.frames` that test clips can be judged frame by frame.

    Raises:
        UserError: a task of more than two classes, or no annotated video in the first test shard.
    """
    recipe = run.recipe
    if not recipe.evaluation.frames or not recipe.data.test:
        return
    classes = run.index.vocabularies.get(recipe.finetune.task, [])
    if classes and positive_class(classes, recipe.finetune.positive) is None:
        raise UserError(
            f"frames are told apart by two classes, and '{recipe.finetune.task}' has no '{recipe.finetune.positive}' "
            "against one other",
            where="evaluation.frames",
            cure="set it to false, or finetune.positive",
        )
    if not spans_of(run, shards=1):
        raise UserError(
            "no test clip says at which frames of its video the events are",
            where=run.index.store.url,
            expected="shards of untrimmed videos with annotations, as shards/xd_violence.py makes",
            cure="pack them anew, or set evaluation.frames=false",
        )


def spans_of(run: RunContext, shards: int | None = None) -> dict[str, Span]:
    """Returns key -> span of the test clips whose video is annotated.

    Args:
        run: index and recipe.
        shards: look at the first few only.
    """
    index = run.index
    found: dict[str, Span] = {}
    for shard in index.select(run.splits("test")).shards.tolist()[:shards]:
        sidecar, name = index.sidecar(shard), index.names[shard]
        places = [sidecar.members(row).get("json", (0, 0)) for row in range(len(sidecar))]
        ranges = [(name, offset, offset + size) for offset, size in places if size]
        for first in range(0, len(ranges), _AT_ONCE):
            for content in index.store.read_ranges(ranges[first : first + _AT_ONCE]):
                record = json.loads(content)
                span = _span(record)
                if span is not None:
                    found[record["key"]] = span
    return found


def _span(record: Mapping[str, Any]) -> Span | None:
    """The span of one clip; None where its video is not annotated."""
    extra = record.get("extra", {})
    try:
        rate, frames = float(extra["frame_rate"]), int(extra["frames"])
        edges = [tuple(map(int, event.split("-"))) for event in extra.get("event_frames", "").split()]
        source = record["source"]
        events = tuple((first, after) for first, after in edges)
        return Span(f"{record['group']} {source['path']}", round(float(source["start"]) * rate), frames, events)
    except (KeyError, TypeError, ValueError):
        return None
