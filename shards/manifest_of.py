"""What the adapters of public data sets share: reading official lists, writing the manifest, reporting, packing.

An adapter turns one official layout into `Video`s; `finish` writes them as the CSV that `crossgate pack` reads.
Whatever is wrong with a layout is one line that names the file, what was expected and the cure.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

# An adapter also runs where the package is not installed, as in a job whose folder travels with it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "platform"))

from crossgate.clips.manifest import TASKS
from crossgate.errors import UserError, writing
from crossgate.runs.pack import PackSettings, pack

SPLITS = ("train", "val", "test")
"""A source that is in two of them stays in the later one."""
VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")

Root = Annotated[Path, typer.Argument(help="Folder of the data set, as its authors lay it out.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Manifest to write (CSV).", show_default=False)]
Pack = Annotated[str, typer.Option("--pack", help="Also pack it: folder or URL for the shards.")]
AsPublished = Annotated[
    bool, typer.Option("--as-published", help="Keep training videos whose source is in the official test split too.")
]


@dataclass(frozen=True)
class Video:
    """One video of an official list.

    Attributes:
        path: where its file should be.
        split: ``train``, ``val`` or ``test``.
        group: what it was cut from, or who is in it.
        labels: task (``action``, ``violence``) -> class.
        depth: 16-bit grey video of a depth sensor, in millimetres.
        extra: further columns.
    """

    path: Path
    split: str
    group: str
    labels: dict[str, str]
    depth: Path | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """What became of the official lists.

    Attributes:
        videos: those that are there, each once, no group in two splits.
        missing: paths of those that are not.
        repeated: videos that were listed again; the latest of train, val, test counts, else the first.
        shared: sources that the official splits put on more than one side.
        left_out: videos of the earlier sides, if they are not kept as published.
    """

    videos: tuple[Video, ...]
    missing: tuple[Path, ...]
    repeated: int
    shared: int
    left_out: int


def listing(videos: Iterable[Video], as_published: bool = False) -> Listing:
    """Returns the videos whose files are there, with groups that keep to one split.

    Some official splits share sources (a film in training and test). Those of training are left out, or else kept as
    published, the groups of each side named apart.

    Raises:
        UserError: an official split of which no video is there, or of which sharing leaves nothing.
    """
    named: dict[Path, Video] = {}
    repeated = 0
    for video in videos:
        repeated += video.path in named
        before = named.setdefault(video.path, video)
        if SPLITS.index(video.split) > SPLITS.index(before.split):
            named[video.path] = video
    there = [video for path, video in named.items() if path.is_file()]
    missing = tuple(path for path in named if not path.is_file())
    for split in SPLITS:
        first = next((path for path, video in named.items() if video.split == split), None)
        if first is not None and not any(video.split == split for video in there):
            raise UserError(f"no video of the official {split} split is there", where=first, cure="check the folder")
    sides: dict[str, set[str]] = {}
    for video in there:
        sides.setdefault(video.group, set()).add(video.split)
    home = {group: max(splits, key=SPLITS.index) for group, splits in sides.items()}
    kept = [video for video in there if as_published or video.split == home[video.group]]
    lost = {video.split for video in there} - {video.split for video in kept}
    if lost:
        what = f"every source of the official {min(lost)} split is in another one too"
        raise UserError(what, cure="--as-published keeps the videos on both sides")
    apart = (v if v.split == home[v.group] else replace(v, group=f"{v.group} ({v.split})") for v in kept)
    shared = sum(len(splits) > 1 for splits in sides.values())
    return Listing(tuple(apart), missing, repeated, shared, len(there) - len(kept))


def write_manifest(videos: Iterable[Video], out: Path) -> None:
    """Writes the CSV, paths relative to it where they lie below its folder.

    Raises:
        UserError: it cannot be written.
    """
    videos = list(videos)
    extra = sorted({name for video in videos for name in video.extra})
    tasks = [task for task in TASKS if any(task in video.labels for video in videos)]
    depth = ["depth_path", "depth_unit"] if any(video.depth for video in videos) else []
    beside = out.with_name(f".{out.name}.part")
    with writing("the manifest", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["path", *tasks, "split", "group", *depth, *extra], restval="")
            table.writeheader()
            for video in videos:
                row = {"path": _written(video.path, out), "split": video.split, "group": video.group}
                if video.depth:
                    row |= {"depth_path": _written(video.depth, out), "depth_unit": "mm"}
                table.writerow(row | video.labels | video.extra)
        os.replace(beside, out)


def finish(
    videos: Iterable[Video], out: Path, settings: PackSettings, pack_to: str = "", as_published: bool = False
) -> None:
    """Writes the manifest of an adapter's videos, says what is in it, and packs it if asked.

    Args:
        videos: all that the official lists name.
        out: the CSV.
        settings: how this data set is best packed.
        pack_to: folder or URL for the shards; empty: say the command.
        as_published: see `listing`.

    Raises:
        UserError: as `listing`, `write_manifest` and `pack`.
    """
    found = listing(videos, as_published)
    write_manifest(found.videos, out)
    for line in report(found):
        typer.echo(line)
    if not pack_to:
        flags = [f"--seconds {settings.seconds:g}", *(["--skip-bad"] if settings.skip_bad else [])]
        typer.echo(f"next: crossgate pack {out} OUT_URL {' '.join(flags)}")
        return
    from crossgate.progress import progress_bar

    with progress_bar("videos") as step:
        index = pack(out, pack_to, settings, step)
    typer.echo(index.summary())


def report(found: Listing) -> Iterator[str]:
    """Yields what a user should know of a listing, line by line."""
    splits = Counter(video.split for video in found.videos)
    classes = {task: {v.labels[task] for v in found.videos if v.labels.get(task)} for task in TASKS}
    counted = ", ".join(f"{len(names)} classes of {task}" for task, names in classes.items() if names)
    counts = ", ".join(f"{split} {splits[split]}" for split in SPLITS if splits[split])
    groups = len({video.group for video in found.videos})
    yield f"{len(found.videos)} videos ({counts}) of {groups} groups, {counted}"
    if found.missing:
        yield f"{len(found.missing)} videos of the official lists are not there, the first: {found.missing[0]}"
    if found.repeated:
        yield f"{found.repeated} lines of the official lists name a video again: it counts once"
    if found.left_out:
        told = f"{found.left_out} videos left out (see --as-published)"
        yield f"{found.shared} sources are in two official splits: {told}"
    elif found.shared:
        yield f"{found.shared} sources are in two official splits: kept as published, on both sides"


def run(command: Callable[..., None]) -> None:
    """Runs an adapter as a script; a `UserError` becomes one line and exit status 2."""
    try:
        typer.run(command)
    except UserError as error:
        typer.echo(f"{Path(sys.argv[0]).name}: {error}", err=True)
        raise SystemExit(2) from None


def folder(root: Path, *names: str) -> Path:
    """Returns the first of these folders that `root` has.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"no folder {' or '.join(names)}", where=root, cure="unpack the official archives there")


def lines_of(path: Path) -> list[str]:
    """Returns the lines of an official list, without empty ones.

    Raises:
        UserError: it is missing, not text, or empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        cure = "get the split files from the data set's page"
        raise UserError("no such split file", where=path, expected="the official one", cure=cure) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"not readable ({error})", where=path) from None
    if not lines:
        raise UserError("the split file is empty", where=path, expected="the official one")
    return lines


def matched(pattern: str, text: str, where: Path, expected: str) -> re.Match[str]:
    """Returns the match of a whole name.

    Raises:
        UserError: it is of another form.
    """
    found = re.fullmatch(pattern, text)
    if found is None:
        raise UserError(f"'{text}' is not understood", where=where, expected=expected)
    return found


def files_below(root: Path, ending: str = "") -> list[Path]:
    """Returns the videos below a folder in the order of their names, or those files whose names end so.

    Raises:
        UserError: there are none.
    """
    endings = (ending,) if ending else VIDEOS
    found = sorted(p for p in root.rglob("*") if p.name.lower().endswith(endings) and not p.name.startswith("."))
    if not found:
        raise UserError("no videos below this folder", where=root, expected=f"files ending in {', '.join(endings)}")
    return found


def _written(path: Path, out: Path) -> str:
    """A corpus may move with its manifest; videos elsewhere stay where they are."""
    path, home = path.absolute(), out.absolute().parent
    return str(path.relative_to(home) if path.is_relative_to(home) else path)
