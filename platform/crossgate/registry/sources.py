"""What a request may name as a video: a path, a URL, bytes or base64. Bounded before anything is read."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossgate.clips.live import shown, without_secrets
from crossgate.clips.media import Limits
from crossgate.config import Config, Count, Positive
from crossgate.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Possessive, for what is no video may be as long: tried in other ways, a megabyte of spaces takes an hour.
_DATA_URL = re.compile(r"data:[\w.+-]*+(/[\w.+-]*+)?+(;[\w=.+-]++)*;base64,", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]++={0,2}+\s*+", re.ASCII)
_SHORTEST_BASE64 = 256  # no video is smaller, and hardly a path is longer
_SCHEMES = ("http", "https", "s3")
_PIECE = 1 << 20
_PIXELS_A_SECOND = 1920 * 1080 * 60
_SPACES = b" \t\n\r\v\f"


class Settings(Config):
    """How a packaged model treats requests; `mlflow.pyfunc.load_model(uri, model_config={...})` overrides."""

    batch: Positive = 16
    """Clips in one forward pass."""
    aggregate: bool = False
    """One row a video, the mean over its clips, instead of one row a clip."""
    megabytes: Positive = 256
    """Largest file or download."""
    seconds: Positive = 600
    """Longest video."""
    megapixels: Positive = 36
    """Largest picture."""
    gigapixels: Count = 0
    """All pictures of a video that are decoded (0: what `seconds` of 1080p have at 60 a second; 75 for 600 s)."""
    items: Positive = 10_000
    """Most items of a request."""
    paths: bool = True
    """Whether a request may name files of the host that serves the model."""
    urls: bool = True
    """Whether a request may name http(s):// and s3:// objects, which that host then fetches."""
    short_side: Count = 0
    """Pixels to which pictures are shrunk before flow is computed (0: 128, or the model's size if that is larger)."""
    threshold: float | None = None
    """Probability of the positive class from which on it is the label (none: the model's own, chosen on validation)."""
    device: str = "auto"
    """`auto`: a GPU where there is one."""

    @property
    def limits(self) -> Limits:
        """Bounds of one file."""
        return Limits(
            bytes=self.megabytes << 20,
            pixels=self.megapixels * 1_000_000,
            seconds=float(self.seconds),
            decoded=self.gigapixels * 1e9 or self.seconds * _PIXELS_A_SECOND,
        )


@dataclass(frozen=True)
class Item:
    """One video of a request.

    Attributes:
        name: for the row: the path or URL; what it was, for bytes.
        video: path or bytes.
        depth: of the depth sensor's stream, if any.
        depth_unit: what one step of it means.
    """

    name: str
    video: Path | bytes
    depth: Path | bytes | None = None
    depth_unit: str = "mm"


def name_of(item: Any) -> str:
    """Returns what a row calls an item, whatever it is, without reading it."""
    if isinstance(item, dict):
        return str(item["name"]) if item.get("name") else name_of(item.get("source"))
    if isinstance(item, bytes | bytearray | memoryview):
        return f"<{len(item)} bytes>"
    if isinstance(item, str | os.PathLike):
        text = str(item)
        return f"<{len(text)} characters>" if len(text) > _SHORTEST_BASE64 else text
    return f"<{type(item).__name__}>"


def is_url(source: str) -> bool:
    """Whether a text names something on another machine, of whatever scheme."""
    return _URL.match(source) is not None


def resolve(item: Any, settings: Settings) -> Item:
    """Returns the video that a path, URL, base64 text, bytes, or dict of ``source`` and ``depth`` names.

    Raises:
        UserError: not such a thing, not there, not allowed or too large.
    """
    if not isinstance(item, dict):
        return Item(name_of(item), _fetch(item, settings))
    unknown = item.keys() - {"source", "depth", "depth_unit", "name"}
    if unknown:
        expected = "source, depth, depth_unit, name"
        raise UserError(f"unknown key '{min(map(str, unknown))}'", where=name_of(item), expected=expected)
    depth, unit = item.get("depth"), item.get("depth_unit")
    return Item(
        name_of(item),
        _fetch(item.get("source"), settings),
        None if _empty(depth) else _fetch(depth, settings),
        "mm" if _empty(unit) else str(unit),
    )


def _empty(value: Any) -> bool:
    """Whether a cell of a table is empty: None, NaN or an empty text."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _fetch(source: Any, settings: Settings) -> Path | bytes:
    largest = settings.megabytes << 20
    if isinstance(source, bytes | bytearray | memoryview):
        _check_size(len(source), largest, name_of(source))
        return bytes(source)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str) or not source:
        raise UserError("not a video", where=name_of(source), expected="a path, URL, bytes or base64")
    if match := _DATA_URL.match(source):
        return _decoded(source, match.end(), largest)
    if is_url(source):
        return b"".join(pieces(source, settings))
    if settings.paths and os.path.isfile(source):
        return Path(source)
    if len(source) >= _SHORTEST_BASE64 and _BASE64.fullmatch(source):
        return _decoded(source, 0, largest)
    if not settings.paths:
        raise UserError("paths are switched off here", where=name_of(source), expected="a URL, bytes or base64")
    if os.path.isdir(source):
        cure = "name its files, or score all of it by crossgate predict --out"
        raise UserError("a folder, not a video", where=name_of(source), cure=cure)
    raise UserError("no such file", where=name_of(source), cure="check the path")


def _decoded(text: str, begin: int, largest: int) -> bytes:
    """Returns the bytes that a text is base64 of, from the character numbered `begin` on.

    Raises:
        UserError: too long, which is seen before anything is copied, or not base64.
    """
    length = len(text) - begin
    where = f"<base64 of {length} characters>"
    if length // 4 * 3 > largest * 1.1:  # line breaks count, too
        raise UserError("too large", where=where, expected=f"at most {largest >> 20} MB")
    try:
        # Without the spaces as bytes: a list of words would take eight bytes for each character.
        data = base64.b64decode(text[begin:].encode("ascii").translate(None, _SPACES), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"not base64 ({error})", where=where) from None
    _check_size(len(data), largest, where)
    return data


def pieces(url: str, settings: Settings) -> Iterator[bytes]:
    """Yields what a URL names, a piece at a time.

    Raises:
        UserError: not such a URL, not there, not allowed or too large; no message shows user name, password or query.
    """
    scheme, where, largest = url.partition("://")[0].lower(), shown(url), settings.megabytes << 20
    if scheme not in _SCHEMES:
        raise UserError(f"scheme {scheme}:// is not read", where=where, expected=", ".join(_SCHEMES))
    if not settings.urls:
        raise UserError("URLs are switched off here", where=where, expected="a path, bytes or base64")
    import fsspec

    total = 0
    try:
        # Without blocks an HTTP body is one stream, which servers without ranges can give as well.
        files, path = fsspec.url_to_fs(url)
        with files.open(path, "rb", **({} if scheme == "s3" else {"block_size": 0})) as file:
            while piece := file.read(_PIECE):  # of a stream as much as has come
                total += len(piece)
                _check_size(total, largest, where)
                yield piece
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"reading {scheme}:// needs another package ({error})", where=where) from None
    except Exception as error:  # each file system has its own family of errors
        said = without_secrets(str(error).strip().replace(url, where))
        reason = said.splitlines()[0][:160] if said not in ("", where) else type(error).__name__
        raise UserError(f"cannot be fetched ({reason})", where=where, cure="check the URL") from None
    _check_size(total, largest, where)


def _check_size(size: int, largest: int, where: str) -> None:
    if size > largest:
        raise UserError("too large", where=where, expected=f"at most {largest >> 20} MB")
    if not size:
        raise UserError("no bytes", where=where, expected="a video")
