"""Cheap hand-made features, a set a modality: what can be learnt from a clip without a network."""

from __future__ import annotations

import csv
from pathlib import Path

import av
import cv2
import numpy as np


def rows(manifest: Path) -> list[dict[str, str]]:
    """Returns the lines of a manifest."""
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def read_video(path: Path) -> np.ndarray:
    """Returns (T, H, W, 3) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_sound(path: Path) -> np.ndarray | None:
    """Returns (samples,) float32, or None without a track."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def read_depth(path: Path) -> np.ndarray:
    """Returns (T, H, W) uint16 millimetres."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def _gradients(picture: np.ndarray, cells: tuple[int, int] = (8, 6)) -> np.ndarray:
    gx, gy = cv2.Sobel(picture, cv2.CV_32F, 1, 0), cv2.Sobel(picture, cv2.CV_32F, 0, 1)
    size, angle = np.hypot(gx, gy), np.arctan2(gy, gx) % np.pi
    grids = [cv2.resize(size * ((angle // (np.pi / 4)) == k), cells, interpolation=cv2.INTER_AREA) for k in range(4)]
    grid = np.stack(grids, -1)
    return np.sqrt(grid / (grid.sum() + 1e-6)).ravel()


def rgb_features(frames: np.ndarray) -> np.ndarray:
    """Stills only: grids of colour and of edges, averaged over frames whose order is forgotten."""
    stills = frames[::4]
    colour = np.mean([cv2.resize(f, (12, 9), interpolation=cv2.INTER_AREA) for f in stills], 0).ravel() / 255
    edges = [_gradients(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY).astype(np.float32)) for f in stills]
    return np.concatenate([colour, np.mean(edges, 0), np.max(edges, 0)])


def flow_features(frames: np.ndarray) -> np.ndarray:
    """Motion only: where, how fast, which way, spreading or not, how even in time."""
    grey = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), (64, 48), interpolation=cv2.INTER_AREA) for f in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    flow = np.stack([dis.calc(a, b, None) for a, b in zip(grey, grey[1:])])  # (T-1, 48, 64, 2)
    flow = flow - np.median(flow, (1, 2), keepdims=True)
    speed = np.linalg.norm(flow, axis=-1)
    energy = speed.mean((1, 2))
    where = cv2.resize(speed.mean(0), (8, 6), interpolation=cv2.INTER_AREA).ravel()
    peak = cv2.resize(speed.max(0), (8, 6), interpolation=cv2.INTER_AREA).ravel()
    angle = np.arctan2(flow[..., 1], flow[..., 0])
    ways = [(speed * (np.floor((angle + np.pi) / (np.pi / 4)) == k)).mean() for k in range(8)]
    y, x = np.mgrid[-1:1:48j, -1:1:64j]
    spread = (flow[..., 0] * x + flow[..., 1] * y).mean((1, 2))
    rhythm = np.abs(np.fft.rfft(energy - energy.mean(), 24))[1:9]
    return np.concatenate(
        [where, peak, ways, rhythm, np.percentile(energy, [5, 25, 50, 75, 95, 100]),
         np.percentile(speed, [50, 75, 90, 95, 99, 100]), [spread.mean(), spread.std(), spread.max(), spread.min()]]
    )  # fmt: skip


def audio_features(wave: np.ndarray) -> np.ndarray:
    """Sound only: level, contrast and rhythm of 12 bands."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::160] * np.hanning(512)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.geomspace(2, 256, 13).astype(int)
    bands = np.log(np.stack([power[:, a : max(b, a + 1)].mean(1) for a, b in zip(edges, edges[1:])], 1) + 1e-6)
    rise = np.maximum(np.diff(bands, axis=0), 0).mean(1)
    rhythm = np.abs(np.fft.rfft(rise - rise.mean(), 200))[1:17]
    return np.concatenate(
        [bands.mean(0), bands.max(0), bands.std(0), np.percentile(bands, 90, axis=0), rhythm,
         np.percentile(rise, [50, 90, 99, 100]), [(rise > 1).mean()]]
    )  # fmt: skip


def depth_features(depth: np.ndarray) -> np.ndarray:
    """Geometry only: a grid of distances, how it changes, and whether what moves comes nearer."""
    metres = depth.astype(np.float32) / 1000
    valid = (metres > 0).astype(np.float32)

    def grid(stack: slice) -> np.ndarray:
        total = cv2.resize((metres[stack] * valid[stack]).mean(0), (12, 9), interpolation=cv2.INTER_AREA)
        return total / (cv2.resize(valid[stack].mean(0), (12, 9), interpolation=cv2.INTER_AREA) + 1e-3)

    third = len(depth) // 3
    first, last = grid(slice(0, third)), grid(slice(-third, None))
    near = [np.percentile(f[f > 0], [3, 8, 15]) if (f > 0).any() else np.zeros(3) for f in metres]
    near = np.array(near)
    trend = np.polyfit(np.linspace(-1, 1, len(near)), near, 1)[0]
    steps = np.array(
        [np.abs(b - a)[(a > 0) & (b > 0)].mean() if (a * b).any() else 0 for a, b in zip(metres, metres[1:])]
    )
    return np.concatenate([((first + last) / 2).ravel(), (last - first).ravel(), trend, near.std(0),
                           np.percentile(steps, [10, 50, 90, 100])])  # fmt: skip


def features(folder: Path, row: dict[str, str]) -> dict[str, np.ndarray | None]:
    """Returns the feature vector of each modality, None where the clip lacks it."""
    frames = read_video(folder / row["path"])
    wave = read_sound(folder / row["path"])
    depth = read_depth(folder / row["depth_path"]) if row["depth_path"] else None
    return {
        "rgb": rgb_features(frames),
        "flow": flow_features(frames),
        "audio": None if wave is None else audio_features(wave),
        "depth": None if depth is None else depth_features(depth),
    }


def tables(folder: Path, lines: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """Returns (N, D) features a modality; an absent one is filled with the mean of the others."""
    found = [features(folder, row) for row in lines]
    result = {}
    for name in ("rgb", "flow", "audio", "depth"):
        mean = np.mean([f[name] for f in found if f[name] is not None], 0)
        result[name] = np.stack([mean if f[name] is None else f[name] for f in found])
    return result
