"""The one error that users are meant to see: a line that says what is wrong and how to mend it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_STREAM = re.compile("inline_container|iostream error")  # torch.save's words for a file that takes no more

NO_MORE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE})
"""What a disk answers that takes no more."""


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
        return _rebuild, (type(self), self.what, self.where and str(self.where), self.expected, self.cure)


class Unreachable(UserError):
    """A store or server does not answer now, and may later: the one user error that starting again can mend."""


def _rebuild(kind: type[UserError], what: str, where: str | None, expected: str | None, cure: str | None) -> UserError:
    error = kind.__new__(kind)
    UserError.__init__(error, what, where=where, expected=expected, cure=cure)
    return error


@contextmanager
def writing(what: str, where: object) -> Iterator[None]:
    """Turns a refusal of the file system, in whatever words a library puts it, into a `UserError`.

    Args:
        what: what is written, with its article.
        where: the file or folder.
    """
    try:
        yield
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        full = not isinstance(error, OSError) or error.errno in NO_MORE
        cure = "free some space" if full else "check the path and who may write there"
        raise UserError(f"cannot write {what} ({reason})", where=where, cure=cure) from None


def _refusal(error: Exception) -> str | None:
    """Returns why a file could not be written, or None when that is not what the error says."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    if type(error).__name__ == "SafetensorError" or (isinstance(error, RuntimeError) and _STREAM.search(text)):
        return text[-120:]
    return None


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns ``did you mean 'x'?`` for the closest valid name, or the list of valid names."""
    valid = sorted(valid)
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(valid)}"
