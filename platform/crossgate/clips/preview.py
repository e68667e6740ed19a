"""A contact sheet: what some packed clips look and sound like, on one picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from crossgate.clips.codec import CODECS
from crossgate.clips.media import SAMPLE_RATE
from crossgate.clips.spectrogram import FLOOR, HOP, log_mel
from crossgate.errors import UserError, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAMES = 6
"""Pictures shown of a clip."""
_GAP = 4  # pixels between them
_HEIGHT = 128  # of a picture on the sheet


def flow_colours(flow: NDArray[np.floating], largest: float) -> NDArray[np.uint8]:
    """Returns ``(..., 3)`` RGB of ``(..., 2)`` flow: hue is the direction, white is no motion (Baker et al. 2007).

    Args:
        flow: in any unit.
        largest: the length that gets full colour.
    """
    u, v = flow[..., 0].astype(np.float32), flow[..., 1].astype(np.float32)
    strength = np.clip(np.hypot(u, v) / max(largest, 1e-6), 0, 1)
    hue = np.mod(np.degrees(np.arctan2(v, u)), 360)
    hsv = np.stack((hue, strength, np.ones_like(hue)), axis=-1).reshape(-1, 1, 3).astype(np.float32)
    colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(*u.shape, 3)
    return np.rint(colours * 255).astype(np.uint8)


def contact_sheet(clips: Sequence[Mapping[str, bytes]], path: str | Path) -> Path:
    """Writes a PNG with frames, flow, log-mel spectrogram and depth of each clip, its labels and degradations.

    Args:
        clips: members of packed clips (suffix -> bytes, with ``json``), or of clips that others wrote (``mp4``).
        path: of the picture.

    Raises:
        UserError: no clips, one cannot be decoded, or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not clips:
        raise UserError("no clips to show", where=path)
    columns = 2 if len(clips) > 1 else 1
    rows = -(-len(clips) // columns)
    decoded = [_decoded(members) for members in clips]
    shown = [name for name in _DRAW if any(name in streams for _, streams in decoded)]
    height = rows * (0.8 + 0.9 * len(shown))
    figure = Figure(figsize=(8.6 * columns, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns, left=0.05, right=0.93, top=1 - 0.5 / height, bottom=0.15 / height,
                               hspace=0.7 / (0.9 * len(shown)), wspace=0.24)  # fmt: skip
    for number, (record, streams) in enumerate(decoded):
        _draw_clip(figure, grid[number // columns, number % columns], shown, record, streams)
    path = Path(path)
    with writing("the picture", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return path


def _decoded(members: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Returns the clip's record and, per modality, `FRAMES` pictures or all samples."""
    record = json.loads(members.get("json", b"{}"))
    if "mp4" in members and CODECS["rgb"].suffix not in members:
        from crossgate.clips.extract import iter_clips

        raw = next(iter_clips(members["mp4"]))
        chosen = _middles(raw.frames)
        streams = {name: s if name == "audio" else s[chosen] for name, s in raw.streams.items()}
        return {"seconds": raw.seconds, **record}, streams
    chosen = _middles(int(record["frames"]))
    present = [name for name in CODECS if CODECS[name].suffix in members]
    return record, {name: CODECS[name].decode(members[CODECS[name].suffix], chosen) for name in present}


def _middles(frames: int) -> NDArray[np.int64]:
    return ((np.arange(FRAMES) + 0.5) * frames / FRAMES).astype(np.int64)


def _draw_clip(
    figure: Figure, place: Any, shown: Sequence[str], record: Mapping[str, Any], streams: Mapping[str, NDArray[Any]]
) -> None:
    inner = place.subgridspec(len(shown), 1, hspace=0.08)
    for row, name in enumerate(shown):
        axes = figure.add_subplot(inner[row, 0])
        if row == 0:
            axes.set_title(_title(record), loc="left", fontsize=8.5, linespacing=1.4)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        if name in streams:
            _DRAW[name](axes, streams[name], record)
        else:
            axes.set_facecolor("0.96")
            axes.text(0.5, 0.5, f"no {name}", ha="center", va="center", color="0.5", transform=axes.transAxes)
        for spine in axes.spines.values():
            spine.set_visible(False)


def _title(record: Mapping[str, Any]) -> str:
    labels = ", ".join(f"{task}: {label}" for task, label in record.get("labels", {}).items()) or "no label"
    spoiled = {name: severity for name, severity in record.get("degraded", {}).items() if severity > 0}
    worse = ", ".join(f"{name} {severity:.1f}" for name, severity in spoiled.items())
    facts = [
        f"{record.get('seconds', 0):.1f} s",
        f"split {record.get('split', '?')}",
        f"group {record.get('group', '?')}",
    ]
    first = f"{record.get('key', '')}   {labels}" + (f"   degraded: {worse}" if worse else "")
    return f"{first}\n{'   '.join(facts)}"


def _strip(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the pictures side by side, ``(H, W, 3)``, at one height."""
    height, width = pictures.shape[1:3]
    size = (round(width * _HEIGHT / height), _HEIGHT)
    gap = np.full((_HEIGHT, _GAP, 3), 225, np.uint8)
    parts = [part for p in pictures for part in (cv2.resize(p, size, interpolation=cv2.INTER_AREA), gap)]
    return np.concatenate(parts[:-1], axis=1)


def _draw_rgb(axes: Axes, pictures: NDArray[np.uint8], record: Mapping[str, Any]) -> None:
    axes.imshow(_strip(pictures), aspect="equal")


def _draw_flow(axes: Axes, flow: NDArray[np.floating], record: Mapping[str, Any]) -> None:
    largest = float(max(0.2, np.percentile(np.hypot(flow[..., 0], flow[..., 1]).astype(np.float32), 99)))
    axes.imshow(_strip(flow_colours(flow, largest)), aspect="equal")
    side = np.linspace(-1, 1, 65)
    wheel = np.stack(np.meshgrid(side, side), axis=-1)
    colours = flow_colours(wheel, 1.0)
    colours[np.hypot(wheel[..., 0], wheel[..., 1]) > 1] = 255
    inset = axes.inset_axes((1.012, 0.28, 0.1, 0.7))
    inset.imshow(colours)
    inset.axis("off")
    axes.text(1.012, 0.1, f"rim {largest:.1f} sides/s", fontsize=6.5, transform=axes.transAxes)


def _draw_audio(axes: Axes, samples: NDArray[np.float32], record: Mapping[str, Any]) -> None:
    seconds = max(len(samples) / SAMPLE_RATE, 0.1)
    spectrogram = log_mel(samples, 64, max(1, len(samples) // HOP))
    extent = (0.0, seconds, 0.0, 64.0)
    axes.imshow(spectrogram, origin="lower", aspect="auto", cmap="magma", vmin=FLOOR, vmax=4, extent=extent)
    axes.text(1.012, 0.75, "64 mel bins\n0 to 8 kHz", fontsize=6.5, va="center", transform=axes.transAxes)
    axes.text(1.012, 0.25, f"{seconds:.1f} s", fontsize=6.5, va="center", transform=axes.transAxes)


def _draw_depth(axes: Axes, depth: NDArray[np.uint16], record: Mapping[str, Any]) -> None:
    from matplotlib import colormaps

    metres = depth / 1000
    known = metres[metres > 0]
    near, far = (float(np.percentile(known, q)) for q in (1, 99)) if len(known) else (0.0, 1.0)
    share = np.clip((metres - near) / max(far - near, 1e-3), 0, 1)
    colours = (colormaps["turbo"](1 - share)[..., :3] * 255).astype(np.uint8)
    colours[depth == 0] = 200  # no measurement is grey
    axes.imshow(_strip(colours), aspect="equal")
    scale = axes.inset_axes((1.012, 0.05, 0.018, 0.9))
    scale.imshow(colormaps["turbo"](np.linspace(1, 0, 64))[:, None, :3], aspect="auto")
    scale.set_xticks([])
    scale.set_yticks([])
    about = record.get("depth", {})
    relative = str(about.get("unit", "")).startswith("relative")
    words = ("near", "no scale", "far") if relative else (f"{near:.1f} m", about.get("kind", "sensor"), f"{far:.1f} m")
    for y, text in zip((0.92, 0.5, 0.08), words):
        axes.text(1.038, y, text, fontsize=6.5, va="center", transform=axes.transAxes)


_DRAW: dict[str, Callable[..., None]] = {
    "rgb": _draw_rgb,
    "flow": _draw_flow,
    "audio": _draw_audio,
    "depth": _draw_depth,
}
