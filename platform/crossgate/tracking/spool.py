"""The journal of a run: everything that MLflow should know, on disk first, with a mark of how far it was delivered.

    RUN/tracking/run.json        who this run is: a key that is also a tag of the MLflow run
    RUN/tracking/spool.jsonl     one record a line, only ever appended to
    RUN/tracking/delivered.json  server, MLflow run, and a byte offset a lane
    RUN/tracking/outbox/         copies of artifacts that do not live in the run directory

Two lanes (small values, files) are delivered each in order, so that a store of files that is down holds up no metric.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Lane = Literal["values", "files"]
Record = dict[str, Any]
LANES: tuple[Lane, ...] = ("values", "files")
_READ_BYTES = 1 << 18


class Spool:
    """The journal in ``run_dir/tracking``; several processes may append at once, since a line is one write."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "tracking"
        self.outbox = self.folder / "outbox"
        self.outbox.mkdir(parents=True, exist_ok=True)
        self._lines = self.folder / "spool.jsonl"
        self._mark = self.folder / "delivered.json"
        self._drop_torn_line()
        self._fd = os.open(self._lines, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.key = self._identity()
        self.target, self.run_id, self._offsets = self._read_mark()

    def close(self) -> None:
        """Releases the file; what was appended stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def closed(self) -> bool:
        """Whether its run has ended here."""
        return self._fd < 0

    def append(self, record: Record) -> None:
        """Adds a record; it survives this process from here on.

        Raises:
            OSError: when the disk is full.
        """
        line = json.dumps(record).encode() + b"\n"
        written = os.write(self._fd, line)
        if written != len(line):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)  # or the next record is glued to this piece
            raise OSError("only part of a line was written")

    def records(self) -> Iterator[Record]:
        """Yields all records since the run began."""
        with self._lines.open("rb") as lines:
            for line in lines:
                record = _parsed(line)
                if record is not None:
                    yield record

    def pending(self, lane: Lane) -> tuple[list[Record], int]:
        """Returns some next undelivered records of the lane, and the offset to acknowledge after them."""
        offset = self._offsets[lane]
        with self._lines.open("rb") as lines:
            lines.seek(offset)
            chunk = lines.read(_READ_BYTES)
            if chunk and b"\n" not in chunk:
                chunk += lines.readline()
        whole = chunk[: chunk.rfind(b"\n") + 1]
        records = [record for line in whole.splitlines() if (record := _parsed(line)) and record["lane"] == lane]
        return records, offset + len(whole)

    def offset(self, lane: Lane) -> int:
        """Returns the byte up to which the lane is delivered."""
        return self._offsets[lane]

    def acknowledge(self, lane: Lane, offset: int) -> None:
        """Remembers that the server has everything of the lane up to the offset."""
        if offset != self._offsets[lane]:
            self._offsets[lane] = offset
            self._write_mark()

    def drained(self, lane: Lane) -> bool:
        """Whether nothing of the lane waits."""
        return self._offsets[lane] >= self._lines.stat().st_size

    def waiting(self) -> int:
        """Returns the number of undelivered records."""
        count, position = 0, 0
        with self._lines.open("rb") as lines:
            for line in lines:
                record = _parsed(line)
                count += record is not None and position >= self._offsets[record["lane"]]
                position += len(line)
        return count

    def bind(self, target: str, run_id: str) -> None:
        """Says which MLflow run of which server this is; another one than before gets everything from the start.

        Args:
            target: the server.
            run_id: empty where the run is not made yet.
        """
        if (target, run_id) != (self.target, self.run_id):
            self.target, self.run_id = target, run_id
            self._offsets = {"values": 0, "files": 0}
            self._write_mark()

    def keep(self, path: Path) -> str:
        """Returns how a record names an artifact: relative to the run directory, after a copy where it must be."""
        path = path.absolute()
        if path.is_relative_to(self.run_dir.absolute()):
            return path.relative_to(self.run_dir.absolute()).as_posix()
        copy = self.new_outbox_file(path.name)
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, copy)
        return copy.relative_to(self.run_dir).as_posix()

    def new_outbox_file(self, name: str) -> Path:
        """Returns a path with this file name in a fresh folder of the outbox."""
        folder = self.outbox / uuid.uuid4().hex[:12]
        folder.mkdir()
        return folder / name

    def discard(self, path: Path) -> None:
        """Removes a delivered artifact if it was only a copy in the outbox."""
        if path.is_relative_to(self.outbox):
            shutil.rmtree(path.parent, ignore_errors=True)

    def _identity(self) -> str:
        file = self.folder / "run.json"
        if not file.exists():
            _replace(file, {"key": uuid.uuid4().hex})
        return json.loads(file.read_text())["key"]

    def _read_mark(self) -> tuple[str, str, dict[str, int]]:
        try:
            mark = json.loads(self._mark.read_text())
            offsets = {lane: min(mark["offsets"][lane], self._lines.stat().st_size) for lane in ("values", "files")}
            return mark["target"], mark["run_id"], offsets
        except (FileNotFoundError, ValueError, KeyError):
            return "", "", {"values": 0, "files": 0}

    def _write_mark(self) -> None:
        _replace(self._mark, {"target": self.target, "run_id": self.run_id, "offsets": self._offsets})

    def _drop_torn_line(self) -> None:
        """A kill in mid-write leaves half a line, which the next append would glue to its own."""
        if not self._lines.exists():
            return
        with self._lines.open("rb+") as lines:
            size = lines.seek(0, os.SEEK_END)
            tail_start = max(0, size - _READ_BYTES)
            lines.seek(tail_start)
            tail = lines.read()
            if tail and not tail.endswith(b"\n"):
                lines.truncate(tail_start + tail.rfind(b"\n") + 1)


def has_journal(run_dir: str | Path) -> bool:
    """Whether the run of a directory has ever been tracked; looking leaves no trace."""
    return (Path(run_dir) / "tracking" / "delivered.json").exists()


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.get("lane") in ("values", "files") else None


def _replace(file: Path, content: Record) -> None:
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(content))
    beside.replace(file)
