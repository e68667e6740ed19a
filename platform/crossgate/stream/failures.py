"""What the failures of a store mean: whether another try may mend them, and the line that a user gets."""

from __future__ import annotations

import asyncio
import errno

from crossgate.errors import NO_MORE, Unreachable, UserError, cure_for

_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError)
_REMOTE_MODULES = ("botocore", "aiobotocore", "aiohttp", "urllib3")
_PASSING_STATUS = (408, 409, 425, 429)  # of the 4xx, those that another try may mend
_PASSING_CODES = ("IncompleteBody", "BadDigest", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch")


def from_store(error: BaseException) -> bool:
    """Whether it is a library's word for an answer, or for none."""
    return type(error).__module__.startswith(_REMOTE_MODULES) or isinstance(error, asyncio.TimeoutError)


def _status(error: BaseException | None) -> tuple[int, str]:
    """Returns the HTTP status and the S3 code of an answer that a failure stands for; 0 and nothing without one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status, str(response.get("Error", {}).get("Code", ""))
    status = getattr(error, "status", 0)
    return (status, "") if isinstance(status, int) else (0, "")


def transient(error: BaseException) -> bool:
    """Whether another try may mend it."""
    if "Credential" in type(error).__name__ or "ProfileNotFound" in type(error).__name__:
        return False
    status, code = _status(error.__cause__ if isinstance(error, OSError) and error.__cause__ else error)
    if isinstance(error, FileNotFoundError):  # fsspec says so of any http answer that is not a file
        return status not in (0, 403, 404, 410) and _passing(status, code)
    if isinstance(error, _FINAL) or (isinstance(error, OSError) and error.errno in NO_MORE):
        return False
    return (isinstance(error, OSError) or from_store(error)) and _passing(status, code)


def _passing(status: int, code: str) -> bool:
    return not 400 <= status < 500 or status in _PASSING_STATUS or code in _PASSING_CODES


def explain(error: BaseException, where: str) -> UserError:
    """Turns a failure of the store into the one line that a user can act on."""
    status, _ = _status(error.__cause__ if isinstance(error, OSError) and error.__cause__ else error)
    denied = isinstance(error, PermissionError) or "Credential" in type(error).__name__ or status in (401, 403)
    if denied:
        own = "check who may read and write there"
        cure = "check the credentials of your environment or profile" if "://" in where else own
        return UserError("access denied", where=where, cure=cure)
    if isinstance(error, FileNotFoundError):
        return UserError("no such file or bucket", where=where, cure="check the URL")
    if isinstance(error, OSError) and error.errno in NO_MORE:
        said = "no space left on the disk" if error.errno == errno.ENOSPC else f"cannot be written ({error.strerror})"
        return UserError(said, where=where, cure=f"{cure_for(error.errno)} and start again")
    kind = Unreachable if transient(error) else UserError
    return kind(f"storage failed ({type(error).__name__}: {error})", where=where, cure="check that it is reachable")
