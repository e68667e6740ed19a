"""Training state as files that know nothing of ranks: pieces of parameters by name, read back by any number of ranks.

Each rank writes the pieces it owns into one safetensors file, without asking another; a reader opens all files and
copies, out of whichever hold them, the elements that it needs. No rank ever has more than its own share in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossgate.training.pieces import Piece

_STEPS = "adam_steps"
_APART = "|"  # stands in no parameter's name


class Unfit(Exception):
    """The files are not of this model, and why."""


def write_pieces(path: Path, pieces: Iterable[Piece], steps: int) -> None:
    """Writes this rank's pieces.

    Args:
        path: of the safetensors file.
        pieces: of `pieces.own_pieces`.
        steps: that the optimiser has taken.
    """
    tensors = {
        _APART.join((piece.name, kind, str(piece.start))): view.cpu().contiguous()
        for piece in pieces
        for kind, view in piece.views.items()
        if len(view)
    }
    save_file(tensors, path, {_STEPS: str(steps)})


class PieceReader:
    """The pieces of all files of a folder; a context manager that closes them.

    Raises:
        Unfit: for a file that is no such file.
    """

    def __init__(self, folder: Path) -> None:
        self.steps = 0
        """Steps that the optimiser had taken."""
        self._files = ExitStack()
        self._parts: dict[tuple[str, str], list[tuple[int, str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = self._files.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise Unfit(f"{path.name} is no safetensors file ({error})") from None
            self.steps = max(self.steps, int((file.metadata() or {}).get(_STEPS, 0)))
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                name, kind, start = key.split(_APART)
                self._parts[name, kind].append((int(start), key, file))

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def check_names(self, expected: set[str]) -> None:
        """Compares the names of everything that was saved with those of the task.

        Raises:
            Unfit: naming some that only one of them has.
        """
        saved = {name for name, _ in self._parts}
        for verb, names in (("lacks", expected - saved), ("has besides", saved - expected)):
            if names:
                raise Unfit(f"it {verb} {', '.join(sorted(names)[:4])}")

    def fill(self, piece: Piece) -> None:
        """Copies into every view of the piece what was saved of it.

        Raises:
            Unfit: when some of its elements were not saved.
        """
        for kind, view in piece.views.items():
            if self._fill(piece.name, kind, piece.start, view) != len(view):
                raise Unfit(f"its {piece.name} is of another size")

    def _fill(self, name: str, kind: str, start: int, view: Tensor) -> int:
        filled, end = 0, start + len(view)
        for begin, key, file in self._parts[name, kind]:
            part = file.get_slice(key)
            first, last = max(start, begin), min(end, begin + part.get_shape()[0])
            if first < last:
                view[first - start : last - start].copy_(part[first - begin : last - begin])
                filled += last - first
        return filled
