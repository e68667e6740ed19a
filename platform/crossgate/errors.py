"""The one error that users are meant to see: a line that says what is wrong and how to mend it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_NUMBERED = re.compile(r"\(os error (\d+)\)")  # safetensors' way to say what the system said
_STREAM = re.compile("inline_container|iostream error")  # torch.save's words for a file that takes no more

NO_MORE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE})
"""What a disk answers that takes no more."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SICK = frozenset({errno.EIO, errno.ESTALE})


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


class Passing(UserError):
    """What starting again may mend, since it lies in the circumstances and not in what the user asked for."""


class Unreachable(Passing):
    """A store or server does not answer now, and may later."""


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
        raise UserError(f"cannot write {what} ({reason})", where=where, cure=cure_for(_number(error))) from None


def cure_for(number: int | None) -> str:
    """Returns what to do where the system refused to write; None: a library that gave no number, mostly a full disk."""
    if number is None or number in _FULL:
        return "free some space"
    if number == errno.EROFS:
        return "mount it writable, or name a folder that is"
    return "check the disk or its mount" if number in _SICK else "check the path and who may write there"


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _NUMBERED.search(str(error))
    return int(found[1]) if found else None


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


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
