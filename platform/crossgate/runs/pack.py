"""From a manifest of videos to shards and an index.

The work is cut into units, fixed lists of videos that become shards of their own, before anything is decoded. So the
bytes written depend neither on the number of workers nor on restarts, and a finished unit is never done twice.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from crossgate import environment
from crossgate.clips.codec import CODECS
from crossgate.clips.depth import Estimator, load_estimator
from crossgate.clips.extract import RawClip, iter_clips
from crossgate.clips.manifest import ClipRow, Manifest, check_files, read_manifest, with_validation
from crossgate.clips.media import probe
from crossgate.config import Config, Count, Fraction, Positive
from crossgate.errors import UserError, nearest
from crossgate.modality import MODALITIES, ordered
from crossgate.stream.index import Index, write_index
from crossgate.stream.shards import ShardEntry, ShardWriter, finished_shard
from crossgate.stream.storage import Store, open_store
from crossgate.stream.survey import finished_shards, side_by_side
from crossgate.workers import end_with_parent

Progress = Callable[[int, int], None]
"""Called with (videos done, videos in all)."""

PackUnits = Callable[[Store, Sequence["Unit"], "PackSettings", Callable[[int], None]], Mapping[str, "UnitReport"]]
"""Packs units: called with (store, units, settings, step) it returns their reports by name, and calls step with the
number of videos done so far."""

_REVISION = 1  # raise it when the same settings give other bytes
_PLAN = "pack.json"


class PackSettings(Config):
    """How videos become shards."""

    task: str = ""
    """Task that the manifest's column `label` belongs to (empty: told by the labels)."""
    classes: tuple[str, ...] = ()
    """Vocabulary of that task; any other label is an error (empty: the labels that occur)."""
    splits: tuple[str, ...] = ()
    """Splits to pack (empty: all)."""
    modalities: tuple[str, ...] = ()
    """Modalities to store, each of which some clip must have (empty: whatever the clips have)."""
    seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Length of a clip; longer videos are cut."""
    short_side: Annotated[int, Field(ge=16, le=2160)] = 128
    """Stored short side in pixels; smaller pictures stay as they are."""
    fps: Annotated[float, Field(gt=0, le=120)] = 12.0
    """Highest stored frame rate; a source's is divided by a whole number to meet it."""
    val_fraction: Fraction = 0.15
    """Share of `train` made `val`, by whole groups, where the manifest has no `val`."""
    shard_clips: Positive = 64
    """Clips in a shard, at most."""
    workers: Count = 0
    """Processes (0: one a core)."""
    seed: Count = 0
    """Which groups become `val`, and the order of the videos."""
    estimator: str = ""
    """Depth for videos without a sensor's: `transformers:MODEL` or `package.module:function` (empty: none)."""
    skip_bad: bool = False
    """Name and skip videos that cannot be packed instead of stopping at the first."""

    @field_validator("modalities")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in MODALITIES:
                raise ValueError(f"unknown modality '{name}'; {nearest(name, MODALITIES)}")
        return ordered(names)

    def digest(self) -> str:
        """SHA-256 of what changes the bytes; the number of workers does not."""
        tree = self.model_dump(mode="json", exclude={"workers"})
        return hashlib.sha256(json.dumps([_REVISION, tree], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Unit:
    """Videos that are packed together, into shards that hold nothing else.

    Attributes:
        name: shards are called ``NAME-000.tar`` and so on.
        split: of all its videos.
        rows: the videos.
        digest: of the whole plan.
    """

    name: str
    split: str
    rows: tuple[ClipRow, ...]
    digest: str


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit: its shards, and the videos that were skipped, each with the reason."""

    shards: tuple[str, ...]
    clips: int
    skipped: tuple[str, ...]


def pack(
    manifest: str | Path,
    out_url: str,
    settings: PackSettings | None = None,
    progress: Progress | None = None,
    pack_units: PackUnits | None = None,
) -> Index:
    """Packs the videos of a manifest; called again after a kill it continues.

    Args:
        manifest: CSV file, see `clips.manifest.read_manifest`.
        out_url: folder for the shards, local or ``s3://``.
        settings: how (None: the defaults).
        progress: called with (videos done, videos in all).
        pack_units: what does the work (None: processes of this machine); the bytes do not depend on it.

    Raises:
        UserError: for whatever is wrong with manifest, videos, settings or folder; finished shards are kept, but
            there is no index, and hence nothing that a run would read.
    """
    settings = settings or PackSettings()
    store = open_store(out_url)
    corpus, units = plan_pack(manifest, settings)
    digest = units[0].digest
    finished = _begin(store, digest)
    if finished is not None:
        return finished
    found = zip(units, side_by_side(lambda unit: _finished(store, unit), units))
    done = {unit.name: report for unit, report in found if report is not None}
    todo = [unit for unit in units if unit.name not in done]
    total = sum(len(unit.rows) for unit in units)
    before = total - sum(len(unit.rows) for unit in todo)

    def step(count: int) -> None:
        if progress:
            progress(before + count, total)

    reports = {**done, **((pack_units or _pack_here)(store, todo, settings, step) if todo else {})}
    return finish_pack(store, corpus, [reports[unit.name] for unit in units], settings)


def plan_pack(manifest: str | Path, settings: PackSettings) -> tuple[Manifest, list[Unit]]:
    """Returns the corpus, its `val` split drawn, and its units.

    Raises:
        UserError: as `read_manifest`; a video is missing; a modality that no video can have.
    """
    corpus = read_manifest(manifest, task=settings.task, classes=settings.classes, splits=settings.splits)
    check_files(corpus)
    corpus = with_validation(corpus, settings.val_fraction, settings.seed)
    _refuse_impossible(corpus, settings)
    facts = [[str(row.path), row.path.stat().st_size, row.split, row.group, row.labels, row.degraded, row.extra,
              str(row.depth_path)] for row in corpus.rows]  # fmt: skip
    digest = hashlib.sha256(json.dumps([settings.digest(), facts], sort_keys=True).encode()).hexdigest()
    units = []
    for split in corpus.splits:
        rows = [row for row in corpus.rows if row.split == split]
        order = np.random.default_rng(settings.seed).permutation(len(rows))  # manifests are sorted by class
        for number, first in enumerate(range(0, len(rows), settings.shard_clips)):
            chosen = tuple(rows[i] for i in order[first : first + settings.shard_clips])
            units.append(Unit(f"{split}-{number:05d}", split, chosen, digest))
    return corpus, units


def pack_unit(
    store: Store, unit: Unit, settings: PackSettings, progress: Callable[[], None] | None = None
) -> UnitReport:
    """Writes the shards of a unit and, last, the record that it is finished.

    Args:
        store: where to.
        unit: what.
        settings: how.
        progress: called after each video.

    Raises:
        UserError: naming the video that cannot be packed.
    """
    skipped: list[str] = []
    entries: list[ShardEntry] = []
    clips = _unit_clips(unit, settings, skipped, progress)
    first = next(clips, None)
    while first is not None:
        writer = ShardWriter(store, f"{unit.name}-{len(entries):03d}.tar", split=unit.split, settings=unit.digest)
        with writer:
            while first is not None and writer.clips < settings.shard_clips:
                writer.add(*first)
                first = next(clips, None)
        assert writer.entry is not None
        entries.append(writer.entry)
    report = UnitReport(tuple(e.name for e in entries), sum(e.clips for e in entries), tuple(skipped))
    store.put(_record_name(unit), json.dumps({"digest": unit.digest, **asdict(report)}).encode())
    return report


def finish_pack(store: Store, corpus: Manifest, reports: Sequence[UnitReport], settings: PackSettings) -> Index:
    """Writes the index of packed units and removes what only the packing needed.

    Raises:
        UserError: when no clip was packed, or none has a modality that the settings name.
    """
    names = [name for report in reports for name in report.shards]
    entries = [entry for entry in finished_shards(store, names) if entry is not None]
    if len(entries) != len(names):
        raise UserError("a shard vanished while packing", where=store.url, cure="pack again")
    counts = {name: sum(entry.modalities.get(name, 0) for entry in entries) for name in MODALITIES}
    plan = json.loads(store.read(_PLAN))
    missing = [name for name in settings.modalities if not counts[name]]
    if missing or not entries:
        skipped = [line for report in reports for line in report.skipped]
        for name in names:
            _discard(store, name)
        _clean(store)
        if missing:
            raise _no_modality(corpus, missing[0], [name for name in counts if counts[name]])
        raise UserError("no video could be packed", where=corpus.path, cure=f"the first: {skipped[0]}")
    skipped = sorted(line for report in reports for line in report.skipped)
    kept = settings.model_dump(mode="json", exclude={"workers"})
    notes = {**kept, "digest": plan["digest"], "manifest": corpus.path.name, "skipped": skipped}
    index = write_index(store, entries, vocabularies=corpus.vocabularies, settings=notes)
    _clean(store)
    return index


# ---- one unit --------------------------------------------------------------------------------------------------


def _unit_clips(
    unit: Unit, settings: PackSettings, skipped: list[str], progress: Callable[[], None] | None
) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """Yields ``(key, members, record)`` of the unit's clips."""
    for row in unit.rows:
        try:
            # Whole before the first is written: half of a broken video is not a clip fewer but a wrong group.
            clips = [_encoded(row, number, raw) for number, raw in enumerate(_raw_clips(row, settings))]
        except UserError as error:
            if not settings.skip_bad:
                raise
            skipped.append(str(error))
        else:
            yield from clips
        if progress:
            progress()


def _raw_clips(row: ClipRow, settings: PackSettings) -> Iterator[RawClip]:
    return iter_clips(
        row.path,
        depth_source=row.depth_path,
        depth_unit=row.depth_unit,
        seconds=settings.seconds,
        short_side=settings.short_side,
        fps=settings.fps,
        modalities=settings.modalities or tuple(MODALITIES),
        estimator=_estimator(settings.estimator),
    )


@lru_cache(maxsize=1)
def _estimator(name: str) -> Estimator | None:
    return load_estimator(name)


def _encoded(row: ClipRow, number: int, raw: RawClip) -> tuple[str, dict[str, bytes], dict[str, Any]]:
    key = f"{row.key}-{number:04d}"
    present = ordered(raw.streams)
    record: dict[str, Any] = {
        "key": key,
        "group": row.group,
        "split": row.split,
        "labels": row.labels,
        "modalities": present,
        "fps": raw.fps,
        "frames": raw.frames,
        "seconds": round(raw.seconds, 6),
        "source": {"path": row.path.name, "start": round(raw.start, 6)},
        "degraded": row.degraded,
        "extra": row.extra,
    }
    if raw.depth_kind:
        record["depth"] = {"kind": raw.depth_kind, **({"unit": row.depth_unit} if raw.depth_kind == "sensor" else {})}
    members = {CODECS[name].suffix: CODECS[name].encode(raw.streams[name], raw.fps) for name in present}
    return key, members, record


# ---- all units -------------------------------------------------------------------------------------------------


def _pack_here(
    store: Store, todo: Sequence[Unit], settings: PackSettings, step: Callable[[int], None]
) -> dict[str, UnitReport]:
    """Packs units in processes of this machine, or in this one if that is enough."""
    workers = min(settings.workers or environment.usable_cores(), len(todo))
    reports: dict[str, UnitReport] = {}
    if workers <= 1:
        counted = count(1)
        for unit in todo:
            reports[unit.name] = pack_unit(store, unit, settings, lambda: step(next(counted)))
        return reports
    # Spawned, not forked: a fork would copy the locks and sockets of this process.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("l", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        jobs: dict[Future[UnitReport], Unit] = {pool.submit(_work, store, unit, settings): unit for unit in todo}
        try:
            left = set(jobs)
            while left:
                ready, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                for job in ready:
                    reports[jobs[job].name] = job.result()
                step(counter.value)
        except BaseException as error:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise died(store) from None
            raise
    return reports


def died(store: Store) -> UserError:
    """Returns what to say when a process was killed while packing, most likely for its memory."""
    cure = "free memory or set fewer workers, and start again: finished shards are kept"
    return UserError("a packing process died", where=store.url, cure=cure)


_counter: Any = None


def _start_worker(counter: Any) -> None:
    global _counter
    end_with_parent()
    _counter = counter


def _work(store: Store, unit: Unit, settings: PackSettings) -> UnitReport:
    def step() -> None:
        with _counter.get_lock():
            _counter.value += 1

    return pack_unit(store, unit, settings, step)


# ---- what a killed packing left --------------------------------------------------------------------------------


def _begin(store: Store, digest: str) -> Index | None:
    """Claims the folder for this plan; returns the index if all is done already.

    Raises:
        UserError: something else is in the folder.
    """
    if store.exists("index.json"):
        index = Index.load(store.url)
        if index.settings.get("digest") == digest:
            _clean(store)  # killed after the index was written
            return index
        raise UserError(
            "other shards are in this folder", where=store.url, cure="pack into another folder, or remove this one"
        )
    if store.exists(_PLAN):
        found = json.loads(store.read(_PLAN)).get("digest")
        if found != digest:
            raise UserError(
                "a packing of other videos or with other settings was begun here",
                where=store.url,
                cure="go on with the same manifest and settings, or remove the folder",
            )
        store.discard_partials()
        return None
    store.put(_PLAN, json.dumps({"digest": digest}).encode())
    return None


def _record_name(unit: Unit) -> str:
    return f"{unit.name}.packed.json"


def _finished(store: Store, unit: Unit) -> UnitReport | None:
    """Returns the report of a unit that is finished: its record is there and all its shards are whole."""
    if not store.exists(_record_name(unit)):
        return None
    record = json.loads(store.read(_record_name(unit)))
    shards = tuple(record["shards"])
    if record["digest"] != unit.digest or any(finished_shard(store, name) is None for name in shards):
        return None
    return UnitReport(shards, record["clips"], tuple(record["skipped"]))


def _clean(store: Store) -> None:
    list(side_by_side(store.delete, store.list(".packed.json")))
    store.delete(_PLAN)
    store.discard_partials()  # of a process that died and whose unit another one packed


def _discard(store: Store, shard: str) -> None:
    store.delete(shard)
    store.delete(f"{shard.removesuffix('.tar')}.idx.parquet")


# ---- modalities ------------------------------------------------------------------------------------------------


def _refuse_impossible(corpus: Manifest, settings: PackSettings) -> None:
    """Raises `UserError` before anything is decoded where no video can have a modality that the settings name."""
    if "depth" in settings.modalities and not settings.estimator and not any(row.depth_path for row in corpus.rows):
        raise _no_modality(corpus, "depth", [name for name in settings.modalities if name != "depth"])
    if "audio" in settings.modalities and not any(_has_track(row) for row in corpus.rows):
        raise _no_modality(corpus, "audio", [name for name in settings.modalities if name != "audio"])


def _has_track(row: ClipRow) -> bool:
    try:
        return probe(row.path).sound
    except UserError:
        return False  # said, with its name, when its turn comes


def _no_modality(corpus: Manifest, name: str, others: Sequence[str]) -> UserError:
    return UserError(
        f"no clip has {name}", where=corpus.path, cure=f"leave it out: --modalities {','.join(others) or 'rgb,flow'}"
    )
