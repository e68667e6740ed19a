"""Makes 200 inputs that a served model must survive: cut, torn, huge, costly, lying, empty and malicious ones.

Each is refused by `BOUNDS`, and those that are bytes by the bounds that a model has by itself, too.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

COUNT = 200
BOUNDS = {"megabytes": 8, "seconds": 60, "megapixels": 4, "gigapixels": 1}
"""Settings of the model that is to survive."""


def hostile(good: bytes, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yields 200 pairs of (what it is, input); files that are needed are written into `folder`.

    Args:
        good: a valid MP4 with sound.
        folder: for files.
    """
    made = [
        *_cut(good),
        *_torn(good),
        *_typed(),
        *_named(folder, good),
        *_huge(),
        *_costly(),
        *_pictureless(folder),
        *_text(),
    ]
    random = np.random.default_rng(7)
    number = 0
    while len(made) < COUNT:  # the rest is noise behind the beginnings that decoders look for
        start = _MAGIC[number % len(_MAGIC)]
        made.append((f"noise behind {start[:8]!r}", start + random.bytes(500 + 700 * number)))
        number += 1
    yield from made[:COUNT]


_MAGIC = (
    b"\x00\x00\x00\x20ftypisom",
    b"\x1aE\xdf\xa3",
    b"RIFF\xff\xff\xff\xffAVI LIST",
    b"OggS\x00\x02",
    b"FLV\x01\x05",
    b"\xff\xd8\xff\xe0",
    b"\x47" * 188,
    b"\x00\x00\x01\xba",
    b"fLaC",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
    b"%PDF-1.7",
    b"PK\x03\x04",
    b"\x7fELF",
    b"\x80\x04\x95",
    b"#EXTM3U\n",
)


def _cut(good: bytes) -> list[tuple[str, Any]]:
    """Truncations that lose the index, which MP4 keeps at its end."""
    lengths = np.linspace(1, len(good) * 0.7, 40).astype(int)
    return [(f"cut to {length} bytes", good[:length]) for length in lengths]


def _torn(good: bytes) -> list[tuple[str, Any]]:
    """Boxes whose sizes lie."""
    found = []
    for box in (b"moov", b"mdat", b"trak", b"stbl", b"stsz", b"stsc", b"stts", b"stsd"):
        at = good.find(box)
        for size in (0xFFFFFFFF, 7):
            found.append((f"{box.decode()} of {size} bytes", good[: at - 4] + struct.pack(">I", size) + good[at:600]))
    return found


def _typed() -> list[tuple[str, Any]]:
    values: list[Any] = [None, 0, -1, 3.5, float("nan"), True, [], [[]], {}, {"source": None}, {"source": {}}]
    values += [{"source": []}, {"sorce": "x"}, {"source": 1e308}, {"source": "", "depth": ""}, {1: 2}, ("a",), object()]
    return [(f"type {value!r}"[:60], value) for value in values]


def _named(folder: Path, good: bytes) -> list[tuple[str, Any]]:
    (folder / "playlist.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (folder / "list.ffconcat").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    (folder / "empty.mp4").touch()
    names = ["../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ"]
    names += [".", "/", "~", "", " ", "\0", "a\0.mp4", "\ud800.mp4", "\udcff\udcfe.mp4", "x" * 300, "x/" * 3000]
    names += ["concat:/etc/passwd|/etc/passwd", "pipe:0", "pipe:ls", "subfile,,start,0,end,9,,:/etc/passwd", "cache:x"]
    names += ["file:///etc/passwd", "ftp://h/x", "rtmp://h/x", "gopher://h/x", "data:,x", "javascript:alert(1)"]
    names += ["http://", "http://127.0.0.1:1/x.mp4", "https://[::1", "s3://", "s3:///x", "http://127.0.0.1:1/../../x"]
    names += [str(folder / name) for name in ("playlist.m3u8", "list.ffconcat", "empty.mp4", "none.mp4")]
    return [(f"name {name!r}"[:60], name) for name in names]


def _huge() -> list[tuple[str, Any]]:
    """Pictures that would take gigabytes, and hours of nothing."""
    found: list[tuple[str, Any]] = []
    for width, height in ((65535, 65535), (30000, 30000), (65535, 1000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        bomb = _png(header, zlib.compress(b"\0" * 5_000_000, 9))
        found.append((f"PNG of {width} x {height}", bomb))
        frame = struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00"
        jpeg = (
            b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\x00\x08\x01\x01\x00\x00?\x00"
        )
        found.append((f"JPEG of {width} x {height}", jpeg + b"\0" * 4000))
        found.append((f"Y4M of {width} x {height}", b"YUV4MPEG2 W%d H%d F25:1\nFRAME\n" % (width, height) + b"\0" * 99))
    found += [(f"{hours} hours", _slow(hours)) for hours in (1, 5, 24, 1000)]
    return found


def _png(header: bytes, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _costly() -> list[tuple[str, Any]]:
    """Small requests, within the bounds of a file and of a picture, that would take long or much memory."""
    hidden = base64.b64encode(static(280, hidden=270)).decode()
    return [
        ("strips", strips(30_000)),
        ("280 pictures of 3.9 megapixels, 270 of them decoded but not shown", hidden),
        ("more base64 than allowed", "A" * (12 << 20)),
        ("a megabyte of spaces", "A" * 300 + " " * (1 << 20) + "!"),
        ("a type of a megabyte", "data:" + "a" * (1 << 20)),
    ]


def strips(width: int) -> bytes:
    """Two seconds of pictures that are 128 pixels high, in a few hundred kilobytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("png", rate=12)
        stream.width, stream.height, stream.pix_fmt = width, 128, "rgb24"
        (packet,) = stream.encode(av.VideoFrame.from_ndarray(np.zeros((128, width, 3), np.uint8), format="rgb24"))
        for number in range(24):
            packet.pts = packet.dts = number
            container.mux(packet)
    return file.getvalue()


def static(frames: int, hidden: int = 0, side: int = 1984) -> bytes:
    """One picture so many times, 2 kilobytes each; the MP4 says of the first `hidden` that they are not shown."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        black = np.zeros((side, side, 3), np.uint8)
        encoded = [stream.encode(av.VideoFrame.from_ndarray(black, format="rgb24")) for _ in range(2)]
        (whole,), (same,) = encoded
        for number in range(frames):
            packet = av.Packet(bytes(same if number else whole))
            packet.stream, packet.time_base, packet.is_keyframe = stream, whole.time_base, not number
            packet.pts = packet.dts = number - hidden
            container.mux(packet)
    return file.getvalue()


def _slow(hours: int) -> bytes:
    """Two frames that many hours apart."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                packet.pts = packet.dts = number * hours * 3600
                container.mux(packet)
        for packet in stream.encode(None):
            packet.pts = packet.dts = hours * 3600
            container.mux(packet)
    return file.getvalue()


def _pictureless(folder: Path) -> list[tuple[str, Any]]:
    """Sound alone, and a container of no frames."""
    found: list[tuple[str, Any]] = []
    for kind, codec in (("wav", "pcm_s16le"), ("matroska", "pcm_s16le"), ("avi", "pcm_s16le")):
        file = io.BytesIO()
        with av.open(file, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=16000, layout="mono")
            tone = av.AudioFrame.from_ndarray(np.full((1, 4096), 900, np.int16), format="s16", layout="mono")
            tone.sample_rate = 16000
            container.mux(stream.encode(tone))
            container.mux(stream.encode(None))
        found.append((f"sound alone, {kind}", file.getvalue()))
    empty = io.BytesIO()
    with av.open(empty, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return [*found, ("no frames", empty.getvalue())]


def _text() -> list[tuple[str, Any]]:
    """Base64 of nothing good, and what only looks like it."""
    texts = ["data:video/mp4;base64,###", "data:video/mp4;base64,", "data:;base64,AAAA", "A" * 257, "=" * 400]
    texts += ["A" * 1000 + "!", "é" * 900, "QUFB" * 300 + "=", base64.b64encode(b"#!/bin/sh\nrm x\n" * 60).decode()]
    texts += [base64.b64encode(b"\x80\x04\x95" + b"c" * 500).decode(), base64.b64encode(bytes(9000)).decode()]
    return [(f"text {text[:40]!r}", text) for text in texts]
