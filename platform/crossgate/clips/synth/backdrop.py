"""The empty room: colour and true depth of every pixel, by intersecting its ray with floor, walls and furniture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from crossgate.clips.synth.scene import Camera, Room, Scene


def _noise(rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """Returns a tileable (size, size) picture of smooth noise in -1..1."""
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((8, 0.5), (32, 0.3), (128, 0.2)):
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        grid = np.pad(grid, 2, mode="wrap")
        scale = size // cells
        big = cv2.resize(grid, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        total += weight * big[2 * scale : 2 * scale + size, 2 * scale : 2 * scale + size]
    return total


def _line(x: np.ndarray, period: float, width: float) -> np.ndarray:
    """Returns 1 within ``width`` metres of a multiple of the period, with soft edges."""
    distance = np.abs((x / period + 0.5) % 1.0 - 0.5) * period
    return np.clip(1.5 - distance / width, 0, 1)


def _plain(u, v, noise):
    return 1 + 0.05 * noise


def _concrete(u, v, noise):
    return 1 + 0.14 * noise


def _carpet(u, v, noise):
    return (1 + 0.12 * noise) * (1 - 0.12 * (np.sin(u * 9) * np.sin(v * 9) > 0.3))


def _planks(u, v, noise):
    row = np.floor(v / 0.18)
    shade = 0.1 * np.sin(row * 12.9898) + 0.08 * noise
    return (1 + shade) * (1 - 0.35 * _line(v, 0.18, 0.012)) * (1 - 0.3 * _line(u + row * 0.37, 1.4, 0.012))


def _tiles(u, v, noise):
    check = (np.floor(u / 0.45) + np.floor(v / 0.45)) % 2
    return (0.92 + 0.14 * check + 0.05 * noise) * (1 - 0.25 * np.maximum(_line(u, 0.45, 0.012), _line(v, 0.45, 0.012)))


def _bricks(u, v, noise):
    row = np.floor(v / 0.14)
    shift = 0.15 * (row % 2)
    tone = 0.1 * np.sin(np.floor((u + shift) / 0.3) * 78.2 + row * 37.7)
    mortar = np.maximum(_line(v, 0.14, 0.012), _line(u + shift, 0.3, 0.012))
    return (0.92 + 0.6 * tone + 0.06 * noise) * (1 - mortar) + 1.06 * mortar


def _stripes(u, v, noise):
    return 0.96 + 0.06 * (np.sin(2 * np.pi * u / 0.4) > 0) + 0.03 * noise


def _panels(u, v, noise):
    low = v < 0.95
    seam = np.maximum(_line(u, 0.6, 0.015) * low, _line(v - 0.95, 9.0, 0.03))
    return np.where(low, 0.82, 1.03) * (1 - 0.3 * seam) + 0.04 * noise


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain, "concrete": _concrete, "carpet": _carpet, "planks": _planks, "tiles": _tiles,
    "bricks": _bricks, "stripes": _stripes, "panels": _panels,
}  # fmt: skip


@dataclass(frozen=True)
class Backdrop:
    """The empty room at the renderer's resolution, with a margin for a camera that shakes.

    Attributes:
        colour: (H, W, 3) uint8 RGB. depth: (H, W) float32 metres along the optical axis.
        floor: (H, W) bool, where shadows fall. margin: pixels on every side.
    """

    colour: np.ndarray
    depth: np.ndarray
    floor: np.ndarray
    margin: int


def pixel_rays(camera: Camera, width: int, height: int, margin: int) -> np.ndarray:
    """Returns (H + 2m, W + 2m, 3) world directions of unit length along the optical axis."""
    focal = camera.focal * width
    x = (np.arange(-margin, width + margin) + 0.5 - width / 2) / focal
    y = (np.arange(-margin, height + margin) + 0.5 - height / 2) / focal
    grid = np.stack([*np.broadcast_arrays(x[None, :], y[:, None]), np.ones((len(y), len(x)))], -1)
    return grid @ camera.rotation


def _box(origin: np.ndarray, rays: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distance (H, W) at which rays enter a box (inf where they miss), and the axis of the face."""
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.minimum((low - origin) / rays, (high - origin) / rays)
        far = np.maximum((low - origin) / rays, (high - origin) / rays)
    enter, leave = near.max(-1), far.min(-1)
    return np.where((enter < leave) & (enter > 0.1), enter, np.inf), near.argmax(-1)


def render_backdrop(scene: Scene, width: int, height: int, margin: int) -> Backdrop:
    """Draws the room without anybody in it."""
    room, camera = scene.room, scene.camera
    cos, sin = np.cos(room.yaw), np.sin(room.yaw)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])  # world to room axes
    rays, origin = pixel_rays(camera, width, height, margin) @ turn.T, turn @ camera.position
    light = turn @ scene.light
    noise = _noise(np.random.default_rng(room.seed))

    best = np.full(rays.shape[:2], np.inf)
    albedo = np.zeros(rays.shape)
    lit = np.zeros(rays.shape[:2])

    def paint(where: np.ndarray, distance: np.ndarray, colour: np.ndarray, facing: float | np.ndarray) -> None:
        best[where], albedo[where], lit[where] = (
            distance[where],
            colour[where],
            np.broadcast_to(facing, best.shape)[where],
        )

    def plane(axis: int, offset: float, texture: str, base: np.ndarray, pictures: bool = False) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = (offset - origin[axis]) / rays[..., axis]
        seen = (distance > 0.1) & (distance < best)
        point = origin + rays * np.where(np.isfinite(distance), distance, 0)[..., None]
        u, v = ((point[..., 0], point[..., 2]), (point[..., 2], point[..., 1]), (point[..., 0], point[..., 1]))[
            {1: 0, 0: 1, 2: 2}[axis]
        ]
        speck = noise[(v * 60).astype(np.int64) % 256, (u * 60).astype(np.int64) % 256]
        colour = base * TEXTURES[texture](u, v, speck)[..., None]
        if pictures:
            _hang_pictures(colour, u, v, room)
        normal = np.sign(origin[axis] - offset)
        paint(seen, distance, colour, max(0.0, float(light[axis] * normal)))
        return seen

    floor = plane(1, 0.0, room.floor, room.floor_colour)
    plane(2, -room.back, room.wall, room.wall_colour, pictures=True)
    plane(0, room.side, room.wall, room.wall_colour * 0.92)
    for (x, z, half_w, half_d, tall, low), colour in zip(room.boxes, room.box_colours, strict=True):
        near, face = _box(
            origin, rays, np.array([x - half_w, low, z - half_d]), np.array([x + half_w, tall, z + half_d])
        )
        point = origin + rays * np.where(np.isfinite(near), near, 0)[..., None]
        drawer = 1 - 0.25 * _line(point[..., 1], 0.38, 0.02) * (face == 2)
        shine = np.maximum(0, light[face] * np.sign(-np.take_along_axis(rays, face[..., None], -1)[..., 0]))
        paint(near < best, near, colour * drawer[..., None], shine)
    floor &= np.isfinite(best) & (np.abs(origin[1] + rays[..., 1] * np.where(np.isfinite(best), best, 0)) < 0.01)
    best = np.minimum(best, 12.0)  # nothing is farther in a closed room; a gap between the walls shows as this

    point = origin + rays * best[..., None]
    glow = 1.3 - 0.05 * np.linalg.norm(point - np.array([0, 2.2, 0.5]), axis=-1)
    corner = 1 - 0.25 * np.exp(-np.abs(point[..., 1]) / 0.12) * ~floor
    shade = (scene.ambient + (1 - scene.ambient) * (0.35 + 0.65 * lit)) * glow * corner
    colour = np.clip(albedo * scene.tint * shade[..., None] * 255, 0, 255).astype(np.uint8)
    return Backdrop(colour, best.astype(np.float32), floor, margin)


def _hang_pictures(colour: np.ndarray, u: np.ndarray, v: np.ndarray, room: Room) -> None:
    for (x, y, half_w, half_h), (frame, canvas) in zip(room.pictures, room.picture_colours, strict=True):
        inside = (np.abs(u - x) < half_w) & (np.abs(v - y) < half_h)
        inner = (np.abs(u - x) < half_w - 0.05) & (np.abs(v - y) < half_h - 0.05)
        colour[inside] = frame * 0.4
        blend = np.clip((v[inner] - y) / half_h * 0.5 + 0.5, 0, 1)[:, None]
        colour[inner] = canvas * blend + (1 - canvas * 0.8) * (1 - blend)
