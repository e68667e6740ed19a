"""From limbs to pictures: rays against rounded cones with a depth buffer, shaded, shadowed, over the backdrop.

A rounded cone is the union of the spheres of radius ``r(s) = ra - s (ra - rb)`` centred on ``a + s (b - a)``,
0 <= s <= 1. With u = p - a, y = u . (b - a) and d = |b - a|^2 - (ra - rb)^2, the envelope of that family is
``d (|u|^2 - ra^2) = (y - ra (ra - rb))^2``, reached at ``s = (y - ra (ra - rb)) / d``: a quadratic along each ray.
The hit is the nearest of the envelope (where 0 <= s <= 1) and the two end spheres, so depth is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from crossgate.clips.synth.backdrop import Backdrop
from crossgate.clips.synth.figure import Limbs
from crossgate.clips.synth.scene import Scene

SUPERSAMPLE = 2
EDGE_STEP = 0.12  # metres between neighbours that leave a depth sensor without a measurement


@dataclass(frozen=True)
class Hits:
    """The visible points of bodies in one picture: N of them.

    Attributes:
        pixel: (N,) row-major index. depth: (N,) metres along the optical axis. limb: (N,) index.
        along: (N,) position on the limb, 0..1. normal: (N, 3) outward, in camera axes.
    """

    pixel: np.ndarray
    depth: np.ndarray
    limb: np.ndarray
    along: np.ndarray
    normal: np.ndarray

    def keep(self, which: np.ndarray) -> Hits:
        """Returns the hits where ``which`` (N,) is true."""
        rows = np.flatnonzero(which)
        return Hits(self.pixel[rows], self.depth[rows], self.limb[rows], self.along[rows], self.normal[rows])


def _runs(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (N,) which run each element is of, and its value: ``start``, ``start + 1``, ... ``count`` of them."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) + np.repeat(start - (np.cumsum(count) - count), count)


def _boxes(ends: np.ndarray, radii: np.ndarray, focal: float, centre: np.ndarray, limit: tuple[int, int]) -> tuple:
    """Returns the first and the last pixel, (C, 2) each, of the picture of every limb in front of the camera."""
    z, r = np.maximum(ends[..., 2:], 0.1 + radii[..., None]), radii[..., None]
    # The picture of a sphere reaches from (xz - r sqrt(x^2 + z^2 - r^2)) / (z^2 - r^2) to the same with a plus.
    middle = ends[..., :2] * z / (z * z - r * r) * focal + centre  # (C, 2, 2)
    half = r * np.sqrt(ends[..., :2] ** 2 + z * z - r * r) / (z * z - r * r) * focal
    low = np.clip(np.floor((middle - half).min(1) - 0.5), 0, limit).astype(np.int64)
    high = np.clip(np.ceil((middle + half).max(1) + 0.5), 0, limit).astype(np.int64)
    hidden = (ends[..., 2] <= 0.1 + radii).any(1)
    high[hidden] = low[hidden]
    return low, high


def cast_rays(
    a: np.ndarray, b: np.ndarray, radii: np.ndarray, focal: float, centre: np.ndarray, width: int, height: int
) -> Hits:
    """Finds what the camera sees of rounded cones.

    Args:
        a, b: (C, 3) ends in camera axes (right, down, forward), metres. radii: (C, 2) metres.
        focal: pixels. centre: of the picture, pixels from its left upper corner. width, height: pixels.
    """
    axis, taper = b - a, radii[:, 0] - radii[:, 1]
    d = np.maximum((axis**2).sum(1) - taper**2, 1e-9)
    start = (a * axis).sum(1) + radii[:, 0] * taper
    rest = d * ((a**2).sum(1) - radii[:, 0] ** 2) - start**2
    # Along the ray X = (x, y, 1) the envelope is k2 t^2 - 2 k1 t + rest = 0 with k1 = w . X: it is hit where
    # k1^2 - k2 rest = X' Q X is positive, an interval of x in each row of the picture.
    w = d[:, None] * a - start[:, None] * axis
    q = w[:, :, None] * w[:, None, :] + rest[:, None, None] * (axis[:, :, None] * axis[:, None, :])
    q -= (rest * d)[:, None, None] * np.eye(3)

    low, high = _boxes(np.stack([a, b], 1), radii, focal, centre, (width, height))
    owner, row = _runs(low[:, 1], np.maximum(high - low, 0)[:, 1])
    y = (row + 0.5 - centre[1]) / focal
    square, linear = q[owner, 0, 0], q[owner, 0, 1] * y + q[owner, 0, 2]
    constant = (q[owner, 1, 1] * y + 2 * q[owner, 1, 2]) * y + q[owner, 2, 2]
    root = linear * linear - square * constant
    inside = square < 0  # otherwise the whole row may be hit
    width_of = np.sqrt(np.maximum(root, 0)) / np.where(inside, -square, 1)
    middle = np.where(inside, -linear / np.where(inside, square, 1), 0)
    first = np.where(inside, np.ceil((middle - width_of) * focal + centre[0] - 0.5), -1)
    last = np.where(inside, np.floor((middle + width_of) * focal + centre[0] - 0.5), width)
    first = np.clip(first, low[owner, 0], high[owner, 0]).astype(np.int64)
    last = np.clip(last + 1, low[owner, 0], high[owner, 0]).astype(np.int64)
    span, column = _runs(first, np.where(inside & (root < 0), 0, np.maximum(last - first, 0)))

    limb, y = owner[span], y[span]
    x, pixel = (column + 0.5 - centre[0]) / focal, row[span] * width + column
    dd = x * x + y * y + 1
    da = a[limb, 0] * x + a[limb, 1] * y + a[limb, 2]
    dx = axis[limb, 0] * x + axis[limb, 1] * y + axis[limb, 2]
    inner = d[limb]
    k2, k1 = inner * dd - dx * dx, inner * da - dx * start[limb]
    h = k1 * k1 - k2 * rest[limb]
    # Where k2 < 0 the ray is steeper than the envelope, which then lies open towards it or away from it: the same
    # root is the way in, or the way out behind a sphere.
    steep = k2 < 0
    t = (k1 - np.sqrt(np.maximum(h, 0))) / np.where(np.abs(k2) < 1e-12, np.inf, k2)
    along = (t * dx - start[limb]) / inner
    t[(along < 0) | (along > 1) | (h < 0) | (t <= 0)] = np.inf
    # The spheres lie within the envelope, so otherwise they matter only where it is not hit between the ends.
    open_ = np.flatnonzero(np.isinf(t) | steep)
    for s, end in ((0, a), (1, b)):
        dot = da[open_] + s * dx[open_]
        root = dot * dot - dd[open_] * ((end**2).sum(1) - radii[:, s] ** 2)[limb[open_]]
        ball = np.where(root >= 0, (dot - np.sqrt(np.maximum(root, 0))) / dd[open_], np.inf)
        along[open_] = np.where(ball < t[open_], s, along[open_])
        t[open_] = np.minimum(t[open_], ball)

    buffer = np.full(width * height, np.inf)
    np.minimum.at(buffer, pixel, t)
    seen = np.flatnonzero((t == buffer[pixel]) & (t > 0.1) & np.isfinite(t))
    limb, along, t, pixel = limb[seen], along[seen], t[seen], pixel[seen]
    point = np.column_stack([x[seen], y[seen], np.ones(len(seen))]) * t[:, None]
    core = a[limb] + axis[limb] * along[:, None]
    radius = radii[limb, 0] - taper[limb] * along
    return Hits(pixel, t, limb, along, (point - core) / radius[:, None])


def _albedo(limbs: Limbs, hits: Hits, lengths: np.ndarray) -> np.ndarray:
    """Returns (N, 3) the cloth's colour at each hit."""
    colour, pattern = limbs.colour[hits.limb], limbs.pattern[hits.limb]
    if not pattern.any():
        return colour
    down = hits.along * lengths[hits.limb]
    band = (down / 0.07) % 1.0 < 0.45
    check = band ^ (hits.normal[:, 0] > 0.1)
    marked = np.where(pattern == 2, check, band & (pattern == 1))
    return np.where(marked[:, None], limbs.trim[hits.limb], colour)


def _shadow(limbs: Limbs, frame: int, scene: Scene, size: tuple[int, int], centre: np.ndarray) -> np.ndarray:
    """Returns (H, W) how much of the lamp's light the bodies keep from the floor, 0..1.

    Args:
        size: width, height of the result. centre: (2,) of the picture, in its pixels.
    """
    mask = np.zeros(size[::-1], np.float32)
    lamp = scene.light * [1, 1.6, 1]  # it stands high: short shadows
    ends = np.stack([limbs.a[frame], limbs.b[frame]], 1)  # (C, 2, 3)
    ends = scene.camera.to_camera(ends - lamp * (ends[..., 1:2] / lamp[1]))
    depth = np.maximum(ends[..., 2], 0.3)
    scale = scene.camera.focal * size[0] / depth
    spots = np.round((ends[..., :2] * scale[..., None] + centre - 0.5) * 16).astype(int).tolist()
    thick = np.maximum(1, np.round(1.7 * limbs.radii.mean(1) * scale.mean(1))).astype(int).tolist()
    for (start, stop), width in zip(spots, thick, strict=True):
        cv2.line(mask, start, stop, 1.0, width, cv2.LINE_8, 4)
    return cv2.GaussianBlur(mask, (0, 0), 1.3)


def render(
    limbs: Limbs, scene: Scene, backdrop: Backdrop, size: tuple[int, int], shake: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Renders a clip.

    Args:
        limbs: of everyone, in world axes, T frames.
        size: width, height of the result; the backdrop stands at `SUPERSAMPLE` times that, with its margin.
        shake: (T, 2) whole supersampled pixels by which the picture is displaced, within the margin.

    Returns:
        (T, H, W, 3) uint8 RGB and (T, H, W) uint16 depth in millimetres, 0 on edges, where nothing is measured.
    """
    width, height = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    camera, m = scene.camera, backdrop.margin
    a, b = camera.to_camera(limbs.a), camera.to_camera(limbs.b)
    lengths = np.linalg.norm(limbs.b - limbs.a, axis=-1)
    light = camera.rotation @ scene.light
    frames = np.empty((len(a), size[1], size[0], 3), np.uint8)
    depths = np.empty((len(a), size[1], size[0]), np.uint16)
    for i, (dx, dy) in enumerate(shake.tolist()):
        centre = np.array([width / 2 + dx, height / 2 + dy])
        window = (slice(m - dy, m - dy + height), slice(m - dx, m - dx + width))
        depth = backdrop.depth[window].copy()
        hits = cast_rays(a[i], b[i], limbs.radii, camera.focal * width, centre, width, height)
        hits = hits.keep(hits.depth < depth.ravel()[hits.pixel])
        depth.ravel()[hits.pixel] = hits.depth
        depths[i] = measure(depth)

        body = np.zeros((height, width, 4), np.uint8)  # colour and coverage
        lit = scene.ambient + (1 - scene.ambient) * np.maximum(hits.normal @ light, 0)
        rim = 0.72 + 0.28 * np.minimum(-hits.normal[:, 2] * 1.6, 1)
        colour = _albedo(limbs, hits, lengths[i]) * scene.tint * (lit * rim * 300)[:, None]
        body.reshape(-1, 4)[hits.pixel, :3] = np.clip(colour, 0, 255)
        body.reshape(-1, 4)[hits.pixel, 3] = 255
        small = cv2.resize(body, size, interpolation=cv2.INTER_AREA)
        room = cv2.resize(backdrop.colour[window], size, interpolation=cv2.INTER_AREA)
        floor = backdrop.floor[window][::SUPERSAMPLE, ::SUPERSAMPLE]
        dark = 1 - 0.5 * _shadow(limbs, i, scene, size, centre / SUPERSAMPLE) * floor
        dark *= 1 - small[..., 3] * np.float32(1 / 255)
        frames[i] = small[..., :3] + (room * dark[..., None]).astype(np.uint8)
    return frames, depths


def measure(depth: np.ndarray) -> np.ndarray:
    """Returns what a sensor reads of a supersampled depth map (H, W) in metres: millimetres, 0 on edges."""
    near = np.ascontiguousarray(depth[::SUPERSAMPLE, ::SUPERSAMPLE])
    # A slope has no second difference, however steep; a step has one on both of its sides.
    bend_x = cv2.filter2D(near, -1, np.array([[1.0, -2, 1]], np.float32))
    bend_y = cv2.filter2D(near, -1, np.array([[1.0], [-2], [1]], np.float32))
    edge = np.maximum(np.abs(bend_x), np.abs(bend_y)) > EDGE_STEP
    return np.where(edge, 0, np.round(near * 1000)).astype(np.uint16)
