"""The CSV that names the videos of a corpus: path, labels, split, group, depth, and whatever else its author knew."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from crossgate.clips.depth import MILLIMETRES
from crossgate.errors import UserError, nearest
from crossgate.modality import MODALITIES

TASKS = ("action", "violence")
"""Tasks whose labels may stand in a column of their own."""
_VIOLENCE = {"fight", "nofight"}
_OWN = {"path", "key", "split", "group", "label", "depth_path", "depth_unit", *TASKS}


@dataclass(frozen=True)
class ClipRow:
    """One video.

    Attributes:
        path: of the video, absolute.
        key: unique name made of letters, digits, ``_`` and ``-``.
        split: its split.
        group: name of the source or subject; the path if the manifest has no such column.
        labels: task -> class name.
        depth_path: of the depth sensor's video, absolute.
        depth_unit: what one step of it means.
        degraded: modality -> known severity of degradation, 0..1.
        extra: the other columns.
        line: in the file, for messages.
    """

    path: Path
    key: str
    split: str
    group: str
    labels: dict[str, str] = field(default_factory=dict)
    depth_path: Path | None = None
    depth_unit: str = "mm"
    degraded: dict[str, float] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    line: int = 0


@dataclass(frozen=True)
class Manifest:
    """A corpus.

    Attributes:
        path: the file.
        rows: its videos, in its order.
        vocabularies: task -> sorted class names.
    """

    path: Path
    rows: tuple[ClipRow, ...]
    vocabularies: dict[str, list[str]]

    @property
    def splits(self) -> dict[str, int]:
        """Split -> number of videos."""
        return dict(Counter(row.split for row in self.rows))

    def where(self, row: ClipRow) -> str:
        """Returns the place of a row for messages."""
        return f"{self.path}, line {row.line}"


def read_manifest(
    path: str | Path,
    *,
    task: str = "",
    unlabelled: Collection[str] = ("unlabelled", ""),
    classes: Sequence[str] = (),
    splits: Collection[str] = (),
) -> Manifest:
    """Reads a manifest: a column ``label``, or columns named after tasks; paths are relative to the file.

    Args:
        path: CSV file in UTF-8 with a header.
        task: the task that ``label`` belongs to. Default: `violence` if its classes are fight and nofight, else
            `action`.
        unlabelled: labels that mean that there is none.
        classes: vocabulary of that task; another label is an error. Default: the labels that occur.
        splits: keep these only. Default: all.

    Raises:
        UserError: naming file, line and cure, for a file or video that is missing, a row without path or split, a
            path that appears twice, a group in two splits, an unknown label, or a split without videos. A split
            called as `unlabelled` says may share groups with one other: its rows follow their group.
    """
    path = Path(path)
    header, lines = _read_csv(path)
    if task and "label" not in header and task not in header:
        raise UserError(f"no labels of task '{task}'", where=path, expected=f"a column label or {task}")
    task = task or _task_of(lines, unlabelled)
    rows = _gathered([_row(path, number, line, task, unlabelled) for number, line in lines], unlabelled)
    if splits:
        there = {row.split for row in rows}
        for split in splits:
            if split not in there:
                raise UserError(f"split '{split}' has no videos", where=path, cure=nearest(split, there))
        rows = [row for row in rows if row.split in splits]
    _refuse_repeats(path, rows)
    _refuse_torn_groups(path, rows)
    vocabularies = _vocabularies(path, rows, task, classes)
    return Manifest(path, tuple(rows), vocabularies)


def check_files(manifest: Manifest) -> None:
    """Raises `UserError` for the first video or depth video that is not there."""
    for row in manifest.rows:
        for file in filter(None, (row.path, row.depth_path)):
            if not file.is_file():
                raise UserError(f"no such video: {file}", where=manifest.where(row), cure="correct or remove the row")


def with_validation(manifest: Manifest, fraction: float, seed: int = 0) -> Manifest:
    """Returns the manifest with some groups of `train` made `val`, unless it has a `val` or no `train`.

    Groups go over whole, in an order that depends on the seed and their names, as long as each brings the classes
    of `val` closer to their share; the result has at least one group in each split if `train` has two.

    Args:
        manifest: the corpus.
        fraction: share of the videos of each class that should become `val`; 0: none.
        seed: another seed, other groups.
    """
    groups: dict[str, Counter[str]] = {}
    for row in manifest.rows:
        if row.split == "train":
            label = next(iter(row.labels.values()), "")
            groups.setdefault(row.group, Counter())[label] += 1
    if "val" in manifest.splits or len(groups) < 2 or fraction <= 0:
        return manifest
    total = sum(groups.values(), Counter())
    missing = {label: fraction * count for label, count in total.items()}
    chosen: set[str] = set()
    for group in sorted(groups, key=lambda name: _digest(f"{seed}\0{name}")):
        after = {label: left - groups[group][label] for label, left in missing.items()}
        if _distance(after, total) < _distance(missing, total) and len(chosen) < len(groups) - 1:
            chosen.add(group)
            missing = after
    if not chosen:  # every group is too big: the smallest will do
        chosen = {min(groups, key=lambda name: (groups[name].total(), _digest(f"{seed}\0{name}")))}
    rows = (replace(row, split="val") if row.split == "train" and row.group in chosen else row for row in manifest.rows)
    return replace(manifest, rows=tuple(rows))


def _distance(missing: Mapping[str, float], total: Mapping[str, int]) -> float:
    """Returns how far the classes are from their shares, each class counting the same."""
    return sum(abs(left) / total[label] for label, left in missing.items())


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            lines = [(reader.line_num, line) for line in reader]
    except FileNotFoundError:
        raise UserError("no such manifest", where=path, expected="a CSV file with columns path and label") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"not readable as CSV ({error})", where=path) from None
    if "path" not in header:
        raise UserError("no column 'path'", where=path, expected="path, label, split, group")
    if not lines:
        raise UserError("no videos in the manifest", where=path, expected="a row for each")
    return header, lines


def _task_of(lines: Iterable[tuple[int, dict[str, str]]], unlabelled: Collection[str]) -> str:
    labels = {(line.get("label") or "").strip() for _, line in lines} - set(unlabelled)
    return "violence" if labels and labels <= _VIOLENCE else "action"


def _row(manifest: Path, number: int, line: dict[str, str], task: str, unlabelled: Collection[str]) -> ClipRow:
    where = f"{manifest}, line {number}"
    if None in line or None in line.values():
        raise UserError("the row has another number of columns than the header", where=where)
    cells = {name: value.strip() for name, value in line.items()}
    if not cells["path"]:
        raise UserError("the path is empty", where=where)
    split = cells.get("split", "train")
    if not split:
        raise UserError("the split is empty", where=where, expected="train, val, test or another name")
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise UserError(f"split '{split}' is not usable", where=where, expected="letters, digits and _")
    labels = {name: cells[name] for name in TASKS if name in cells}
    if "label" in cells:
        labels[task] = cells["label"]
    folder = manifest.parent.resolve()
    depth, unit = cells.get("depth_path", ""), cells.get("depth_unit") or "mm"
    if depth and unit not in MILLIMETRES:
        raise UserError(f"unknown depth unit '{unit}'", where=where, expected=" or ".join(MILLIMETRES))
    return ClipRow(
        path=folder / cells["path"],
        key=_key(cells["path"]),
        split=split,
        group=cells.get("group") or cells["path"],
        labels={name: label for name, label in labels.items() if label not in unlabelled},
        depth_path=folder / depth if depth else None,
        depth_unit=unit,
        degraded=_degraded(cells, where),
        extra={k: v for k, v in cells.items() if k not in _OWN and not k.startswith("degraded_") and v},
        line=number,
    )


def _gathered(rows: list[ClipRow], unlabelled: Collection[str]) -> list[ClipRow]:
    """Returns the rows with those of a split of unlabelled videos moved to the split of the rest of their group.

    A corpus may well keep its unlabelled videos apart; but pretraining on one whose group is in `test` would leak.
    """
    home = {row.group: row.split for row in rows if row.split not in unlabelled}
    return [replace(row, split=home.get(row.group, row.split)) if row.split in unlabelled else row for row in rows]


def _degraded(cells: Mapping[str, str], where: str) -> dict[str, float]:
    found = {}
    for name in MODALITIES:
        text = cells.get(f"degraded_{name}", "")
        if text:
            try:
                found[name] = float(text)
            except ValueError:
                found[name] = math.nan
            if not 0 <= found[name] <= 1:
                raise UserError(f"degraded_{name} is '{text}'", where=where, expected="a number from 0 to 1")
    return found


def _key(path: str) -> str:
    """Returns a key that tells the file's name and is unique by its path."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).stem).strip("-")[:60]
    return f"{name}-{_digest(path)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_repeats(path: Path, rows: Iterable[ClipRow]) -> None:
    seen: dict[Path, int] = {}
    for row in rows:
        if row.path in seen:
            raise UserError(
                f"{row.path.name} is also on line {seen[row.path]}",
                where=f"{path}, line {row.line}",
                cure="keep one of the rows",
            )
        seen[row.path] = row.line


def _refuse_torn_groups(path: Path, rows: Iterable[ClipRow]) -> None:
    splits: dict[str, ClipRow] = {}
    for row in rows:
        other = splits.setdefault(row.group, row)
        if other.split != row.split:
            raise UserError(
                f"group '{row.group}' is in split '{row.split}', and on line {other.line} in '{other.split}'",
                where=f"{path}, line {row.line}",
                cure="give all videos of a group one split",
            )


def _vocabularies(path: Path, rows: Iterable[ClipRow], task: str, classes: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, label in row.labels.items():
            if name == task and classes and label not in classes:
                raise UserError(
                    f"unknown label '{label}'", where=f"{path}, line {row.line}", cure=nearest(label, classes)
                )
            found.setdefault(name, set()).add(label)
    if classes:
        found[task] = set(classes)
    return {name: sorted(labels) for name, labels in sorted(found.items())}
