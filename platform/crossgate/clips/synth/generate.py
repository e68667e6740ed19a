"""A folder of synthetic clips with its manifest: parallel, resumable, the same bytes however it was made."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from crossgate import environment
from crossgate.clips.synth.clip import record
from crossgate.clips.synth.degrade import KINDS, find
from crossgate.clips.synth.files import write_depth, write_video
from crossgate.clips.synth.plan import ClipPlan, plan_clip, plan_splits
from crossgate.errors import UserError, cure_for
from crossgate.workers import end_with_parent

REVISION = 1  # raise it when the same arguments give other clips
_ARGUMENTS = "synth.json"
_CHUNK = 6  # clips a worker takes at once: about one group, which shares its backdrop

COLUMNS = (
    "path", "action", "violence", "split", "group", "has_audio", "depth_path", "depth_unit",
    *(f"degraded_{name}" for name in KINDS), "degradation", "fps", "frames", "width", "height",
)  # fmt: skip


def generate(
    out: Path,
    *,
    clips: int,
    seed: int = 0,
    size: tuple[int, int] = (128, 96),
    fps: int = 12,
    seconds: float = 2.0,
    clips_per_group: int = 6,
    degraded: float = 0.5,
    val: float = 0.15,
    test: float = 0.2,
    unlabelled: float = 0.0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes clips into a folder and returns the path of its ``manifest.csv``.

    Called again with the same arguments it makes only what is missing. Clip i depends on the seed and i (and the
    shape arguments), never on the number of clips or workers; the splits depend on the number of clips as well.

    Args:
        out: the folder; made if it is not there.
        clips: how many. From 36 on (48 with `unlabelled`; at six a group) every split covers all twelve actions.
        size: width and height, even numbers of pixels. seconds: of each clip, at ``fps`` frames a second.
        clips_per_group: clips of one scene and pair of people.
        degraded: share of clips with at least one spoiled modality.
        val, test, unlabelled: shares of the splits; the rest is ``train``. Labels of ``unlabelled`` are withheld.
        workers: processes; 0 takes one a CPU. 1 stays in this process.
        progress: called with the number of finished clips and of all clips.

    Raises:
        UserError: an argument is out of range, the folder holds something else, or the disk is full.
    """
    arguments = {
        "revision": REVISION, "clips": clips, "seed": seed, "size": list(size), "fps": fps, "seconds": seconds,
        "clips_per_group": clips_per_group, "degraded": degraded, "val": val, "test": test,
        "unlabelled": unlabelled,
    }  # fmt: skip
    _check(arguments)
    out = Path(out)
    try:
        _claim(out, arguments)
        plans = [plan_clip(seed, index, clips_per_group, degraded) for index in range(clips)]
        splits = plan_splits(seed, clips, clips_per_group, {"val": val, "test": test, "unlabelled": unlabelled})
        _render_missing(out, plans, (seed, size, fps, seconds), workers or environment.usable_cores(), progress)
        return _write_manifest(out, plans, splits, size, fps, seconds)
    except OSError as error:
        raise UserError(
            f"could not write clips: {error.strerror or error}",
            where=out,
            cure=f"{cure_for(error.errno)}, or name another folder",
        ) from error


def _check(arguments: dict) -> None:
    width, height = arguments["size"]
    rules = (
        ("clips", arguments["clips"] >= 1, "1 or more"),
        ("seed", arguments["seed"] >= 0, "0 or more"),
        ("size", min(width, height) >= 32 and width % 2 == height % 2 == 0, "two even numbers from 32 on"),
        ("fps", 4 <= arguments["fps"] <= 60, "4 to 60"),
        ("seconds", 1 <= arguments["seconds"] <= 60, "1 to 60"),
        ("clips_per_group", arguments["clips_per_group"] >= 1, "1 or more"),
        ("degraded", 0 <= arguments["degraded"] <= 1, "a share from 0 to 1"),
        ("val", arguments["val"] >= 0, "a share from 0 to 1"),
        ("unlabelled", arguments["unlabelled"] >= 0, "a share from 0 to 1"),
        ("test", arguments["val"] + arguments["test"] + arguments["unlabelled"] < 1, "shares that sum to less than 1"),
        ("test", arguments["test"] >= 0, "a share from 0 to 1"),
    )
    for name, holds, expected in rules:
        if not holds:
            raise UserError(f"{name} is {arguments[name]}", where="synth", expected=expected)


def _claim(out: Path, arguments: dict) -> None:
    """Marks the folder as made with these arguments, or finds that it is."""
    if out.exists() and not out.is_dir():
        raise UserError("is a file", where=out, expected="a folder", cure="name another one")
    note = out / _ARGUMENTS
    if note.exists():
        try:
            earlier = json.loads(note.read_text())
        except ValueError:
            earlier = {}
        if earlier != arguments:
            other = [
                name for name in arguments if not isinstance(earlier, dict) or earlier.get(name) != arguments[name]
            ]
            raise UserError(
                f"holds clips made with another {', '.join(other) or 'set of arguments'}",
                where=out,
                expected="the same arguments or an empty folder",
                cure="name another folder or remove this one",
            )
        return
    if out.exists() and any(out.iterdir()):
        raise UserError("is not empty", where=out, expected="an empty folder", cure="name another one")
    for folder in ("videos", "depth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _replace(note, json.dumps(arguments, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, newline="")
    part.replace(path)


def _has_depth(plan: ClipPlan) -> bool:
    spoiled = find(plan.degradations, "depth")
    return spoiled is None or spoiled.kind != "missing"


def _has_audio(plan: ClipPlan) -> bool:
    spoiled = find(plan.degradations, "audio")
    return spoiled is None or spoiled.kind != "missing"


def _make(out: Path, plans: list[ClipPlan], how: tuple[int, tuple[int, int], int, float]) -> int:
    """Records and writes some clips; the video comes last, so that its presence says the clip is whole."""
    import cv2

    cv2.setNumThreads(1)  # the processes share the cores already
    seed, size, fps, seconds = how
    for plan in plans:
        take = record(plan, seed, size, fps, seconds)
        if take.depth is not None:
            write_depth(out / "depth" / f"{plan.name}.mkv", take.depth, fps)
        write_video(out / "videos" / f"{plan.name}.mp4", take.frames, fps, take.sound)
    return len(plans)


def _render_missing(
    out: Path,
    plans: list[ClipPlan],
    how: tuple[int, tuple[int, int], int, float],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    videos, depths = set(os.listdir(out / "videos")), set(os.listdir(out / "depth"))
    missing = [
        plan
        for plan in plans
        if f"{plan.name}.mp4" not in videos or (_has_depth(plan) and f"{plan.name}.mkv" not in depths)
    ]
    done = len(plans) - len(missing)
    chunks = (missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK))
    for count in _each(out, chunks, how, min(workers, -(-len(missing) // _CHUNK))):
        done += count
        if progress:
            progress(done, len(plans))


def _each(out: Path, chunks: Iterable[list[ClipPlan]], how: tuple, workers: int) -> Iterable[int]:
    if workers <= 1:
        yield from (_make(out, chunk, how) for chunk in chunks)
        return
    chunks = iter(chunks)
    # Spawned, not forked: the caller may hold threads and locks of torch or ray.
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
        running = {pool.submit(_make, out, chunk, how) for chunk in islice(chunks, 2 * workers)}
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                    running |= {pool.submit(_make, out, chunk, how) for chunk in islice(chunks, 1)}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_manifest(
    out: Path, plans: list[ClipPlan], splits: list[str], size: tuple[int, int], fps: int, seconds: float
) -> Path:
    path = out / "manifest.csv"
    if path.exists():
        return path
    part = out / f".manifest.csv.{os.getpid()}.part"
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for plan, split in zip(plans, splits, strict=True):
            depth = _has_depth(plan)
            row = {
                "path": f"videos/{plan.name}.mp4",
                "action": "" if split == "unlabelled" else plan.action.name,
                "violence": "" if split == "unlabelled" else plan.action.violence,
                "split": split,
                "group": f"scene_{plan.group:05d}",
                "has_audio": int(_has_audio(plan)),
                "depth_path": f"depth/{plan.name}.mkv" if depth else "",
                "depth_unit": "mm" if depth else "",
                "degradation": ";".join(map(str, plan.degradations)),
                "fps": fps,
                "frames": max(2, round(fps * seconds)),
                "width": size[0],
                "height": size[1],
            }
            for name in KINDS:
                spoiled = find(plan.degradations, name)
                row[f"degraded_{name}"] = spoiled.severity if spoiled else 0.0
            writer.writerow(row)
    part.replace(path)
    return path
