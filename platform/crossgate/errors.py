"""The one error that users are meant to see: a line that says what is wrong and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something outside the code is wrong: a file, a key, a server, a disk.

    The command line prints it as one line and exits with status 2; it never shows a stack trace for it.

    Args:
        what: what is wrong, as a short sentence without a full stop.
        where: the file, URL or key at fault.
        expected: what would have been right.
        cure: what the user can do next.
    """

    def __init__(
        self, what: str, *, where: object | None = None, expected: str | None = None, cure: str | None = None
    ) -> None:
        self.what, self.where, self.expected, self.cure = what, where, expected, cure
        parts = [f"{where}: {what}" if where is not None else what]
        if expected:
            parts.append(f"expected {expected}")
        if cure:
            parts.append(cure)
        super().__init__("; ".join(part.replace("\n", " ") for part in parts))

    def __reduce__(self):  # crosses process borders with its keyword arguments
        return _rebuild, (self.what, self.where and str(self.where), self.expected, self.cure)


def _rebuild(what: str, where: str | None, expected: str | None, cure: str | None) -> UserError:
    return UserError(what, where=where, expected=expected, cure=cure)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns ``did you mean 'x'?`` for the closest valid name, or the list of valid names."""
    valid = sorted(valid)
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(valid)}"
