"""Why each stream is stored as it is: bytes, encoding and decoding time, and error of the candidates.

    python benchmarks/storage.py [MANIFEST.csv ...] [--clips 48]

On the videos of manifests; without any, on generated clips, whose pictures are simpler than those of real ones.

Times are CPU time of one core, the best of five, in one run; decoding gives what a training step of 8 frames needs
(all samples for audio). The clips are those that `pack` would store (128 px, at most 12 frames a second).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import cv2
import numpy as np

from crossgate.clips.codec import CODECS, AudioCodec, DepthCodec, FlowCodec, RgbCodec, encode_frames, encode_sound
from crossgate.clips.extract import RawClip, iter_clips
from crossgate.clips.manifest import read_manifest
from crossgate.clips.media import chosen_frames, open_media
from crossgate.clips.spectrogram import log_mel
from crossgate.clips.synth import generate

FRAMES = 8
Array = np.ndarray


@dataclass
class Candidate:
    """One way to store a stream; `decode` gives it back as `RawClip` has it, `FRAMES` of it for pictures."""

    name: str
    encode: Callable[[Array, float], bytes]
    decode: Callable[[bytes, Array], Array]


def coded(name: str, codec: Any) -> Candidate:
    return Candidate(name, codec.encode, codec.decode)


def video(name: str, codec: str, pixel_format: str, options: dict[str, str], container: str, given: str) -> Candidate:
    def decode(data: bytes, chosen: Array) -> Array:
        return np.stack([picture.copy() for picture in chosen_frames(data, chosen, given)])

    settings = {"codec": codec, "pixel_format": pixel_format, "options": options, "container": container}
    return Candidate(name, lambda stream, fps: encode_frames(stream, fps, **settings), decode)


def with_options(codec: Any, **changes: str) -> Any:
    changed = type(codec)()
    changed.options = {**codec.options, **changes}
    return changed


class FullFlow(FlowCodec):
    """Flow at full size: the stream is doubled first, which the codec then halves."""

    def encode(self, stream: Array, fps: float) -> bytes:
        size = (stream.shape[2] * 2, stream.shape[1] * 2)
        return super().encode(np.stack([cv2.resize(f.astype(np.float32), size) for f in stream]), fps)


class H264Flow(FlowCodec):
    """The same levels as H.264."""

    def encode(self, stream: Array, fps: float) -> bytes:
        levels = np.stack([p.copy() for p in chosen_frames(super().encode(stream, fps), None, "gray")])
        options = {"crf": "18", "tune": "fastdecode", "bf": "0", "x264-params": "mbtree=0"}
        return encode_frames(levels, fps, codec="libx264", pixel_format="yuv420p", options=options, container="mp4")


class HalfDepth(DepthCodec):
    """Depth at half the side."""

    def encode(self, stream: Array, fps: float) -> bytes:
        size = (stream.shape[2] // 2, stream.shape[1] // 2)
        small = [cv2.resize(d, size, interpolation=cv2.INTER_NEAREST_EXACT) for d in stream]
        return super().encode(np.stack(small), fps)


def sound(name: str, codec: str, sample_format: str, options: dict[str, str], container: str) -> Candidate:
    def decode(data: bytes, chosen: Array) -> Array:
        with open_media(data) as source:  # Opus decodes at 48 kHz
            resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
            frames = [s for f in source.decode(audio=0) for s in resampler.resample(f)] + resampler.resample(None)
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])

    settings = {"codec": codec, "sample_format": sample_format, "options": options, "container": container}
    return Candidate(name, lambda stream, fps: encode_sound(stream, **settings), decode)


X264 = {"crf": "20", "preset": "medium", "x264-params": "mbtree=0"}
RGB = CODECS["rgb"]
CANDIDATES: dict[str, list[Candidate]] = {
    "rgb": [
        coded("**H.264 crf 20, fast decoding, no B frames**", RgbCodec()),
        coded("the same, crf 18", with_options(RGB, crf="18")),
        coded("the same, crf 23", with_options(RGB, crf="23")),
        video("H.264 crf 20", "libx264", "yuv420p", X264, "mp4", "rgb24"),
        video("H.264 crf 20, key frames only", "libx264", "yuv420p", {**X264, "g": "1"}, "mp4", "rgb24"),
        video("Motion JPEG q 2", "mjpeg", "yuvj420p", {"qmin": "2", "qmax": "2"}, "mp4", "rgb24"),
        video("Motion JPEG q 4", "mjpeg", "yuvj420p", {"qmin": "4", "qmax": "4"}, "mp4", "rgb24"),
    ],
    "flow": [
        coded("**asinh 8 bit, half side, Motion JPEG q 2**", FlowCodec()),
        coded("the same, q 3", with_options(CODECS["flow"], qmin="3", qmax="3")),
        coded("the same, full side", FullFlow()),
        coded("asinh 8 bit, half side, H.264 crf 18", H264Flow()),
    ],
    "audio": [
        coded("**FLAC 16 bit**", AudioCodec()),
        sound("WAV 16 bit", "pcm_s16le", "s16", {}, "wav"),
        sound("Opus 32 kbit/s", "libopus", "flt", {"b": "32000"}, "ogg"),
        sound("Opus 64 kbit/s", "libopus", "flt", {"b": "64000"}, "ogg"),
        sound("AAC 64 kbit/s", "aac", "fltp", {"b": "64000"}, "mp4"),
    ],
    "depth": [
        coded("**logarithm 8 bit, PNG**", DepthCodec()),
        coded("the same, half side", HalfDepth()),
        video("millimetres 16 bit, FFV1", "ffv1", "gray16le", {"g": "1"}, "matroska", "gray16le"),
        video("millimetres 16 bit, PNG", "png", "gray16be", {"pred": "paeth"}, "mov", "gray16le"),
    ],
}
ERRORS = {
    "rgb": "PSNR, dB",
    "flow": "end point error, pixels a frame: mean, 99th percentile",
    "audio": "RMS of the log-mel spectrogram",
    "depth": "relative: mean, share of pixels off by over 5 %",
}


def error_rgb(back: Array, stream: Array, fps: float) -> list[float]:
    return [10 * np.log10(255**2 / max(1e-3, np.mean((back.astype(np.float64) - stream) ** 2)))]


def error_flow(back: Array, stream: Array, fps: float) -> list[float]:
    height, width = stream.shape[1:3]
    whole = np.stack([cv2.resize(field, (width, height)) for field in back])
    length = np.linalg.norm(whole - stream.astype(np.float32), axis=-1) * min(height, width) / fps
    return [float(length.mean()), float(np.percentile(length, 99))]


def error_audio(back: Array, stream: Array, fps: float) -> list[float]:
    steps = len(stream) // 160
    return [float(np.sqrt(np.mean((log_mel(back, 64, steps) - log_mel(stream, 64, steps)) ** 2)))]


def error_depth(back: Array, stream: Array, fps: float) -> list[float]:
    size = (stream.shape[2], stream.shape[1])
    whole = np.stack([cv2.resize(d, size, interpolation=cv2.INTER_NEAREST_EXACT) for d in back]).astype(np.float64)
    known = stream > 0
    relative = np.abs(whole[known] / stream[known] - 1)
    return [float(relative.mean()), float((relative > 0.05).mean())]


ERROR = {"rgb": error_rgb, "flow": error_flow, "audio": error_audio, "depth": error_depth}


def cpu_ms(call: Callable[[], Any], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best * 1e3


def measure(candidate: Candidate, modality: str, clips: list[RawClip]) -> list[float]:
    """Returns the means over clips of bytes, encoding ms, decoding ms and errors."""
    rows = []
    for clip in clips:
        stream = clip.streams[modality]
        data = candidate.encode(stream, clip.fps)
        chosen = ((np.arange(FRAMES) + 0.5) * clip.frames / FRAMES).astype(np.int64)
        back = candidate.decode(data, chosen)
        encode_ms = cpu_ms(partial(candidate.encode, stream, clip.fps), repeats=2)
        decode_ms = cpu_ms(partial(candidate.decode, data, chosen))
        wanted = stream if modality == "audio" else stream[chosen]
        rows.append([len(data), encode_ms, decode_ms, *ERROR[modality](back, wanted, clip.fps)])
    return np.mean(rows, axis=0).tolist()


def load(manifests: list[Path], count: int) -> dict[str, list[RawClip]]:
    """Returns for each modality up to `count` clips of each manifest, spread over it."""
    found: dict[str, list[RawClip]] = {name: [] for name in CANDIDATES}
    for path in manifests:
        rows = read_manifest(path).rows
        chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
        for row in (rows[i] for i in chosen):
            clip = next(iter_clips(row.path, depth_source=row.depth_path, depth_unit=row.depth_unit))
            for name in clip.streams:
                if clip.frames >= FRAMES and not (name == "depth" and row.depth_unit != "mm"):
                    found[name].append(clip)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="*", type=Path)
    parser.add_argument("--clips", type=int, default=16, help="clips of each manifest")
    parser.add_argument("--out", type=Path, help="default: results/storage.md, or results/storage-generated.md")
    arguments = parser.parse_args()
    name = "storage.md" if arguments.manifests else "storage-generated.md"
    out = arguments.out or Path(__file__).parent / "results" / name
    with TemporaryDirectory() as folder:
        made = [] if arguments.manifests else [generate(Path(folder) / "clips", clips=arguments.clips, degraded=0.0)]
        clips = load(arguments.manifests or made, arguments.clips)
    kind = "given" if arguments.manifests else "generated"
    machine = f"{platform.machine()}, PyAV {av.__version__}"
    lines = [f"{datetime.date.today()}, {kind} clips, {machine}, CPU time of one core"]
    summary: dict[str, dict[str, float]] = {}
    for modality, candidates in CANDIDATES.items():
        if not clips[modality]:
            continue
        lines += ["", f"### {modality} ({len(clips[modality])} clips)", ""]
        lines += [f"| stored as | bytes | encode ms | decode ms | {ERRORS[modality]} |", "| --- " + "| ---: " * 4 + "|"]
        for candidate in candidates:
            row = measure(candidate, modality, clips[modality])
            errors = ", ".join(f"{error:.3g}" for error in row[3:])
            lines.append(f"| {candidate.name} | {row[0]:,.0f} | {row[1]:.1f} | {row[2]:.2f} | {errors} |")
            if candidate is candidates[0]:
                summary[modality] = {
                    "bytes": round(row[0]),
                    "encode_ms": round(row[1], 2),
                    "decode_ms": round(row[2], 2),
                }
            print(lines[-1], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
