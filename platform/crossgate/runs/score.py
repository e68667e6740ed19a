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
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crossgate.config import TrackingConfig
from crossgate.errors import Unreachable, UserError
from crossgate.model.store import model_directory, read_card
from crossgate.recipe import redacted
from crossgate.registry.predictor import Predictor
from crossgate.registry.release import fetched, pinned_version
from crossgate.registry.sources import Settings, name_of
from crossgate.stream.storage import Store, open_store

log = logging.getLogger("crossgate.runs")

PLAN, TOTALS = "plan.json", "scores.json"
VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
UNIT = 64
"""Videos in a part, by default."""
REGISTERED = "models:/"
_AT_ONCE = 8  # videos that are held in memory
_HELD = 256 << 20  # bytes of them, after which no further one is fetched
_USUAL = Settings()
_AGAIN = "then start again: finished parts are kept"
_GONE = "gone since the list was made"
_NAMED = 3  # folders in a warning

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ScorePlan:
    """What is to be scored, by what; the same on every machine and at every start.

    Attributes:
        model: ``models:/NAME/VERSION`` or a directory.
        digest: of the model's weights.
        tracking_uri: server of a registered model: as the present call names it; the file has it without password.
        source: folder or URL.
        units: names of the videos below it, a part of the table each.
        megabytes, seconds: largest and longest video that is scored; any other is a row with an error.
        left_out: folders below the source that may not be read; their videos are in no unit.
        weights: directory of the same weights that the present call names, which is used instead of `model`.
    """

    model: str
    digest: str
    tracking_uri: str
    source: str
    units: list[list[str]]
    megabytes: int = _USUAL.megabytes
    seconds: int = _USUAL.seconds
    left_out: list[str] = field(default_factory=list)
    weights: str = ""

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
    model: str
    """That scored them: ``models:/NAME/VERSION`` or a directory."""
    left_out: list[str]
    """Folders that might not be read when the list of videos was made."""


Spread = Callable[[Store, ScorePlan, Sequence[int], Callable[[int], None]], None]
"""``spread(out, plan, units, step)``: scores these units somewhere, calling `step` with the videos done so far."""


def score(
    model: str,
    source: str,
    out: str,
    *,
    unit: int = UNIT,
    tracking_uri: str = "",
    bounds: Mapping[str, int] | None = None,
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
        bounds: `megabytes` and `seconds` of the plan where they are not the predictor's (of the first start).
        progress: ``step(done, total)`` in videos.
        spread: where units are scored (None: here, one after another).

    Raises:
        UserError: nothing to score, or `out` is the table of another model or source, or of other bounds.
    """
    store = open_store(out)
    plan = _plan(store, model, source, unit, tracking_uri, bounds or {})
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
    rows, errors = (sum(mark[key] for mark in marks) for key in ("rows", "errors"))
    totals = Scored(plan.videos, rows, errors, digest, plan.model, plan.left_out)
    store.put(TOTALS, json.dumps(asdict(totals)).encode())
    return totals


def score_unit(store: Store, plan: ScorePlan, number: int) -> int:
    """Scores the videos of a unit, writes its part and then its mark; returns the number of videos.

    Raises:
        Unreachable: the source or `store` cannot be reached, which is no fault of a video.
        UserError: the model cannot be had, or is not the plan's.
    """
    model, names = plan.weights or plan.model, plan.units[number]
    predictor = _predictor(model, plan.digest, plan.tracking_uri, plan.megabytes, plan.seconds)
    rows: list[dict[str, Any]] = []
    for given in _batches(open_store(plan.source), names, predictor.settings):
        reasons = {item["name"]: reason for item, reason in given if reason}
        in_memory = {item["name"]: name_of(item["source"]) for item, _ in given}
        for row in predictor.predict([item for item, _ in given]).to_dict(orient="records"):
            where = row["source"]
            said = reasons.get(where) or row["error"]
            error = said and said.replace(in_memory[where], where)
            rows.append({str(key): value for key, value in row.items()} | {"error": error})
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


def _plan(store: Store, model: str, source: str, unit: int, tracking_uri: str, bounds: Mapping[str, int]) -> ScorePlan:
    """Returns the plan of the first start, after a look whether it is still what is asked for."""
    if not store.exists(PLAN):
        left_out: list[str] = []
        names = sorted(_videos(source, left_out.append))
        if left_out:
            named = ", ".join(left_out[:_NAMED]) + (" ..." if len(left_out) > _NAMED else "")
            log.warning("%s: folders that may not be read are left out (%d): %s", source, len(left_out), named)
        if not names:
            raise UserError("no videos", where=source, expected=f"files ending in {', '.join(VIDEOS)}")
        pinned, digest = _pinned(model, tracking_uri)
        units = [names[start : start + unit] for start in range(0, len(names), unit)]
        plan = ScorePlan(pinned, digest, redacted(tracking_uri), source, units, **bounds, left_out=left_out, weights="")
        _write_once(store, plan)
    kept = ScorePlan(**json.loads(store.read(PLAN)))
    _check_same(kept, store, model, source, bounds)
    # A directory needs no server, and the one that the table began with may have moved.
    return replace(kept, tracking_uri=tracking_uri, weights="" if model.startswith(REGISTERED) else model)


def _write_once(store: Store, plan: ScorePlan) -> None:
    """Writes the plan, unless another first start with the same table has by now; what is there then is the plan."""
    body = json.dumps(asdict(plan)).encode()
    if not store.local:
        # The last one stays, and who reads it back goes on with it. A start that read its own before that goes on
        # with its own: only where the list of videos or the alias changed in between do the two differ.
        store.put(PLAN, body)
        return
    beside = f".{PLAN}-{secrets.token_hex(4)}"
    store.put(beside, body)
    try:
        os.link(store.path(beside), store.path(PLAN))  # whole at once, and never over another
    except FileExistsError:
        pass
    except OSError:  # a file system without links: as on object storage
        store.put(PLAN, body)
    finally:
        store.delete(beside)


def _check_same(kept: ScorePlan, store: Store, model: str, source: str, bounds: Mapping[str, int]) -> None:
    cure = "name another --out, or delete it"
    if source != kept.source:
        raise UserError(f"holds the scores of {kept.source}", where=store.url, cure=cure)
    if not _is_of(kept, model):
        raise UserError(f"holds the scores of another model, {kept.model}", where=store.url, cure=cure)
    for name, asked in bounds.items():
        if asked != (fixed := getattr(kept, name)):
            raise UserError(f"was begun with --{name} {fixed}, not {asked}", where=store.url, cure=cure)


def _is_of(kept: ScorePlan, model: str) -> bool:
    """Whether the table's model is the one that is asked for.

    An alias may have moved on since: the version that the table began with goes on. A registered name is compared
    without asking the server; whose weights it gives then, `_predictor` looks at.
    """
    if not model.startswith(REGISTERED):
        return read_card(model_directory(model)).digest == kept.digest
    name, at, _ = model.rpartition("@")
    return kept.model.rpartition("/")[0] == name if at else kept.model == model


def _pinned(model: str, tracking_uri: str) -> tuple[str, str]:
    """Returns the model under a name that always means the same, and its digest."""
    if model.startswith(REGISTERED):
        model = pinned_version(model, TrackingConfig(uri=tracking_uri))
        with fetched(model, TrackingConfig(uri=tracking_uri)) as folder:
            return model, read_card(folder).digest
    return model, read_card(model_directory(model)).digest


def _videos(source: str, leave_out: Callable[[str], None]) -> Iterator[str]:
    """Yields the names of the videos below a folder or prefix, relative to it; `leave_out` as of `_walk`."""
    store = open_store(source)
    if store.local:
        if not os.path.isdir(store.url):
            what = "a file, not a folder" if os.path.isfile(store.url) else "no such folder"
            raise UserError(what, where=source, cure="check the path; a few videos are labelled without --out")
        for folder, files in _walk(store.url, leave_out):
            for name in filter(_is_video, files):
                yield os.path.relpath(os.path.join(folder, name), store.url)
    elif store.url.startswith("s3://"):
        root = store.url.removeprefix("s3://")
        for path in store.fs.find(store.url):
            if _is_video(str(path)):
                yield str(path).removeprefix(f"{root}/")
    else:
        raise UserError("cannot be listed", where=source, expected="a folder or an s3:// URL")


def _walk(root: str, leave_out: Callable[[str], None]) -> Iterator[tuple[str, list[str]]]:
    """Yields every folder below with its files, each once however many links lead to it.

    Args:
        root: the folder.
        leave_out: is told of each folder below it that is not open to this user, such as the ``lost+found`` of a disk.

    Raises:
        Unreachable: any other folder cannot be listed: its videos would be missing for ever.
    """

    def failed(error: OSError) -> None:
        if isinstance(error, PermissionError) and error.filename != root:
            leave_out(error.filename)
        elif not isinstance(error, FileNotFoundError):
            raise _away(error, error.filename) from None

    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=failed):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()  # which of several names a video has is the same at every start
        yield folder, files


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEOS) and not os.path.basename(name).startswith(".")


# ---- a part ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _predictor(model: str, digest: str, tracking_uri: str, megabytes: int, seconds: int) -> Predictor:
    """One a process: a worker scores many units."""
    with ExitStack() as stack:
        folder = Path(model)
        if model.startswith(REGISTERED):
            folder = stack.enter_context(fetched(model, TrackingConfig(uri=tracking_uri)))
        predictor = Predictor(folder, Settings(megabytes=megabytes, seconds=seconds))
    if predictor.card.digest != digest:
        raise UserError(
            "is not the model that the table began with: it has other weights",
            where=model,
            cure="check the path or --tracking-uri, or name another --out",
        )
    return predictor


def _batches(store: Store, names: Sequence[str], settings: Settings) -> Iterator[list[tuple[dict[str, Any], str]]]:
    """Yields the items of a unit with their reasons, as many at once as may be in memory."""
    batch: list[tuple[dict[str, Any], str]] = []
    for name in names:
        batch.append(_item(store, name, settings))
        if len(batch) == _AT_ONCE or sum(len(item["source"] or b"") for item, _ in batch) >= _HELD:
            yield batch
            batch = []
    if batch:
        yield batch


def _item(store: Store, name: str, settings: Settings) -> tuple[dict[str, Any], str]:
    """Returns what the predictor is given, and why it cannot be scored.

    The video is read here, whole, so that an outage stops the work and does not become a row: what a decoder says of
    a file that its disk does not give is what it says of a bad one, or that the video ends there. None is read that is
    larger than the predictor takes.

    Raises:
        Unreachable: the folder or store does not give it, which is no fault of the video.
    """
    where = store.path(name)
    nothing = {"source": None, "name": where}
    size, why = _size(store, name)
    if why:
        return nothing, str(UserError(why, where=where))
    if size > settings.megabytes << 20:
        return nothing, str(UserError(f"{size} bytes", where=where, expected=f"at most {settings.megabytes} MB"))
    return {"source": _read(store, name), "name": where}, ""


def _size(store: Store, name: str) -> tuple[int, str]:
    """Returns the bytes of a video, and why it cannot be read where the source is there and it is not, or no file."""
    if not store.local:
        return (store.size(name), "") if store.exists(name) else (0, _GONE)
    try:
        found = os.stat(store.path(name))
        return found.st_size, "" if stat.S_ISREG(found.st_mode) else "no ordinary file"  # a pipe would never end
    except (FileNotFoundError, NotADirectoryError):
        _check_mounted(store.url)
        return 0, _GONE
    except OSError as error:
        raise _away(error, store.path(name)) from None


def _read(store: Store, name: str) -> bytes:
    if not store.local:
        return store.read(name)
    try:
        return Path(store.path(name)).read_bytes()
    except OSError as error:
        raise _away(error, store.path(name)) from None


def _check_mounted(folder: str) -> None:
    """Raises `Unreachable` for a folder that is not there, or empty, as the place of a mount is without it."""
    try:
        with os.scandir(folder) as entries:
            found = "" if next(entries, None) else "it is empty"
    except OSError as error:
        found = error.strerror or str(error)
    if found:
        cure = f"mount it on every machine that scores, {_AGAIN}"
        raise Unreachable(f"the videos are not there ({found})", where=folder, cure=cure)


def _away(error: OSError, where: str) -> Unreachable:
    cure = f"check its disk, its mount and who may read it, or take it away, {_AGAIN}"
    return Unreachable(f"cannot be read ({error.strerror or error})", where=where, cure=cure)


def _table(rows: Sequence[dict[str, Any]], classes: Sequence[str], modalities: Sequence[str]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "source": pa.array([_text(row["source"]) for row in rows], pa.string()),
        "start_s": pa.array([row["start_s"] for row in rows], pa.float64()),
        "label": pa.array([row["label"] for row in rows], pa.string()),
        "score": pa.array([_number(row["score"]) for row in rows], pa.float32()),
    }
    for kind, names in (("scores", classes), ("weights", modalities)):
        for name in names:
            values = [_number((row[kind] or {}).get(name)) for row in rows]
            columns[f"{kind.rstrip('s')}_{name}"] = pa.array(values, pa.float32())
    columns["modalities"] = pa.array([row["modalities"] for row in rows], pa.list_(pa.string()))
    columns["error"] = pa.array([row["error"] and _text(row["error"]) for row in rows], pa.string())
    return pa.table(columns)


def _text(value: str) -> str:
    """Returns a file's name as text: bytes of it that are none show as replacement characters."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


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
