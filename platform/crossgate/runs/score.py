"""Scores every video below a folder or bucket prefix into Parquet: each exactly once, whatever is killed when.

OUT/plan.json            model, source and units, fixed before any work
OUT/part-00003.parquet   the rows of a unit
OUT/part-00003.json      its digest, written after it: a part without one, or of another digest, is made anew
OUT/scores.json          totals, written last
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crossgate.config import TrackingConfig
from crossgate.errors import UserError
from crossgate.model.store import model_directory, read_card
from crossgate.registry.predictor import Predictor
from crossgate.registry.release import fetched, pinned_version
from crossgate.registry.sources import Settings
from crossgate.stream.storage import Store, open_store

PLAN, TOTALS = "plan.json", "scores.json"
VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
UNIT = 64
"""Videos in a part, by default."""
_AT_ONCE = 8  # videos of a remote store that are held in memory

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScorePlan:
    """What is to be scored, by what; the same on every machine and at every start.

    Attributes:
        model: ``models:/NAME/VERSION`` or a directory.
        digest: of the model's weights.
        tracking_uri: server of a registered model.
        source: folder or URL.
        units: names of the videos below it, a part of the table each.
    """

    model: str
    digest: str
    tracking_uri: str
    source: str
    units: list[list[str]]

    @property
    def videos(self) -> int:
        """Videos in all."""
        return sum(map(len, self.units))


@dataclass(frozen=True)
class Scored:
    """What a whole table holds."""

    videos: int
    rows: int
    errors: int
    """Rows of videos that could not be read."""
    digest: str
    """SHA-256 over the digests of all parts: the same videos and model give the same on the same kind of machine."""


Spread = Callable[[Store, ScorePlan, Sequence[int], Callable[[int], None]], None]
"""``spread(out, plan, units, step)``: scores these units somewhere, calling `step` with the videos done so far."""


def score(
    model: str,
    source: str,
    out: str,
    *,
    unit: int = UNIT,
    tracking_uri: str = "",
    progress: Progress | None = None,
    spread: Spread | None = None,
) -> Scored:
    """Scores all videos below `source` that no earlier start has scored.

    Args:
        model: ``models:/NAME@ALIAS``, or the directory of a run or model. An alias is followed once, at the first
            start: a table never mixes versions.
        source: folder, or ``s3://`` URL of a prefix; folders below it count.
        out: folder or ``s3://`` URL for the table.
        unit: videos in a part (of the first start).
        tracking_uri: server of a registered model.
        progress: ``step(done, total)`` in videos.
        spread: where units are scored (None: here, one after another).

    Raises:
        UserError: nothing to score, or `out` is the table of another model or source.
    """
    store = open_store(out)
    plan = _plan(store, model, source, unit, tracking_uri)
    waiting = [number for number in range(len(plan.units)) if _finished(store, number) is None]
    done = plan.videos - sum(len(plan.units[number]) for number in waiting)

    def step(videos: int) -> None:
        if progress is not None:
            progress(done + videos, plan.videos)

    step(0)
    if waiting:
        (spread or _here)(store, plan, waiting, step)
    marks = [_mark(store, number) for number in range(len(plan.units))]
    digest = hashlib.sha256("".join(mark["sha256"] for mark in marks).encode()).hexdigest()
    totals = Scored(plan.videos, sum(mark["rows"] for mark in marks), sum(mark["errors"] for mark in marks), digest)
    store.put(TOTALS, json.dumps(asdict(totals)).encode())
    return totals


def score_unit(store: Store, plan: ScorePlan, number: int) -> int:
    """Scores the videos of a unit, writes its part and then its mark; returns the number of videos.

    Raises:
        UserError: the source or `store` cannot be reached, which is no fault of a video: start again later.
    """
    predictor, names = _predictor(plan.model, plan.tracking_uri), plan.units[number]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(names), _AT_ONCE):
        given = [_item(plan.source, name, predictor.settings) for name in names[start : start + _AT_ONCE]]
        reasons = {item["name"]: reason for item, reason in given if reason}
        for row in predictor.predict([item for item, _ in given]).to_dict(orient="records"):
            reason = reasons.get(row["source"], row["error"])
            rows.append({str(key): value for key, value in row.items()} | {"error": reason})
    table = _table(rows, predictor.card.classes, predictor.modalities)
    body = io.BytesIO()
    pq.write_table(table, body)
    content = body.getvalue()
    store.put(_part(number), content)
    errors = sum(row["error"] is not None for row in rows)
    mark = {"sha256": hashlib.sha256(content).hexdigest(), "rows": len(rows), "videos": len(names), "errors": errors}
    store.put(_part(number, ".json"), json.dumps(mark).encode())
    return len(names)


def _here(store: Store, plan: ScorePlan, units: Sequence[int], step: Callable[[int], None]) -> None:
    done = 0
    for number in units:
        done += score_unit(store, plan, number)
        step(done)


# ---- the plan --------------------------------------------------------------------------------------------------


def _plan(store: Store, model: str, source: str, unit: int, tracking_uri: str) -> ScorePlan:
    """Returns the plan of the first start, after a look whether it is still what is asked for."""
    if store.exists(PLAN):
        kept = ScorePlan(**json.loads(store.read(PLAN)))
        _check_same(kept, store, model, source, tracking_uri)
        return kept
    names = sorted(_videos(source))
    if not names:
        raise UserError("no videos", where=source, expected=f"files ending in {', '.join(VIDEOS)}")
    model, digest = _pinned(model, tracking_uri)
    units = [names[start : start + unit] for start in range(0, len(names), unit)]
    plan = ScorePlan(model, digest, tracking_uri, source, units)
    store.put(PLAN, json.dumps(asdict(plan)).encode())
    return plan


def _check_same(kept: ScorePlan, store: Store, model: str, source: str, tracking_uri: str) -> None:
    cure = "name another --out, or delete it"
    if source != kept.source:
        raise UserError(f"holds the scores of {kept.source}", where=store.url, cure=cure)
    # An alias may have moved on since; the version that the table began with goes on.
    if "@" not in model and _pinned(model, tracking_uri)[1] != kept.digest:
        raise UserError(f"holds the scores of another model, {kept.model}", where=store.url, cure=cure)


def _pinned(model: str, tracking_uri: str) -> tuple[str, str]:
    """Returns the model under a name that always means the same, and its digest."""
    if model.startswith("models:/"):
        model = pinned_version(model, TrackingConfig(uri=tracking_uri))
        with fetched(model, TrackingConfig(uri=tracking_uri)) as folder:
            return model, read_card(folder).digest
    return model, read_card(model_directory(model)).digest


def _videos(source: str) -> Iterator[str]:
    """Yields the names of the videos below a folder or prefix, relative to it."""
    store = open_store(source)
    if store.local:
        if not os.path.isdir(store.url):
            raise UserError("no such folder", where=source, cure="check the path")
        for folder, _, files in os.walk(store.url, followlinks=True):
            for name in files:
                if _is_video(name):
                    yield os.path.relpath(os.path.join(folder, name), store.url)
    elif store.url.startswith("s3://"):
        root = store.url.removeprefix("s3://")
        for path in store.fs.find(store.url):
            if _is_video(str(path)):
                yield str(path).removeprefix(f"{root}/")
    else:
        raise UserError("cannot be listed", where=source, expected="a folder or an s3:// URL")


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEOS) and not os.path.basename(name).startswith(".")


# ---- a part ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _predictor(model: str, tracking_uri: str) -> Predictor:
    """One a process: a worker scores many units."""
    if not model.startswith("models:/"):
        return Predictor(model)
    with ExitStack() as stack:
        return Predictor(Path(stack.enter_context(fetched(model, TrackingConfig(uri=tracking_uri)))))


def _item(source: str, name: str, settings: Settings) -> tuple[dict[str, Any], str]:
    """Returns what the predictor is given, and why it cannot be scored.

    A remote video is fetched here, so that an outage stops the work and does not become a row; none is that is larger
    than the predictor takes.
    """
    store = open_store(source)
    where = store.path(name)
    if store.local:
        return {"source": where, "name": where}, ""
    nothing = {"source": None, "name": where}
    if not store.exists(name):
        return nothing, str(UserError("gone since the list was made", where=where))
    size = store.size(name)
    if size > settings.megabytes << 20:
        return nothing, str(UserError(f"{size} bytes", where=where, expected=f"at most {settings.megabytes} MB"))
    return {"source": store.read(name), "name": where}, ""


def _table(rows: Sequence[dict[str, Any]], classes: Sequence[str], modalities: Sequence[str]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "source": pa.array([row["source"] for row in rows], pa.string()),
        "start_s": pa.array([row["start_s"] for row in rows], pa.float64()),
        "label": pa.array([row["label"] for row in rows], pa.string()),
        "score": pa.array([_number(row["score"]) for row in rows], pa.float32()),
    }
    for kind, names in (("scores", classes), ("weights", modalities)):
        for name in names:
            values = [_number((row[kind] or {}).get(name)) for row in rows]
            columns[f"{kind.rstrip('s')}_{name}"] = pa.array(values, pa.float32())
    columns["modalities"] = pa.array([row["modalities"] for row in rows], pa.list_(pa.string()))
    columns["error"] = pa.array([row["error"] for row in rows], pa.string())
    return pa.table(columns)


def _number(value: float | None) -> float | None:
    return None if value is None or value != value else value


def _part(number: int, suffix: str = ".parquet") -> str:
    return f"part-{number:05d}{suffix}"


def _mark(store: Store, number: int) -> dict[str, Any]:
    return json.loads(store.read(_part(number, ".json")))


def _finished(store: Store, number: int) -> dict[str, Any] | None:
    """Returns the mark of a part that is there and whole."""
    if not store.exists(_part(number, ".json")) or not store.exists(_part(number)):
        return None
    mark = _mark(store, number)
    return mark if hashlib.sha256(store.read(_part(number))).hexdigest() == mark["sha256"] else None
