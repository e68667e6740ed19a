"""The renderer against geometry worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from crossgate.clips.synth.backdrop import render_backdrop
from crossgate.clips.synth.figure import Limbs, draw_body, joints, two_bones
from crossgate.clips.synth.motion import Stance
from crossgate.clips.synth.render import cast_rays, measure, render
from crossgate.clips.synth.scene import draw_scene

W, H, F = 160, 120, 150.0
CENTRE = np.array([W / 2, H / 2])


def march(x: float, y: float, a: np.ndarray, b: np.ndarray, ra: float, rb: float) -> float:
    """The slow, obvious way: the nearest of very many spheres along the limb."""
    ray, s = np.array([x, y, 1.0]), np.linspace(0, 1, 4001)
    centre, radius = a + s[:, None] * (b - a), ra + s * (rb - ra)
    dot, square = centre @ ray, ray @ ray
    root = dot * dot - square * ((centre**2).sum(1) - radius**2)
    return np.min((dot - np.sqrt(np.maximum(root, 0))) / square, initial=np.inf, where=root >= 0)


def one(a, b, ra, rb):
    return cast_rays(np.array([a]), np.array([b]), np.array([[ra, rb]]), F, CENTRE, W, H)


def test_a_capsule_at_a_known_distance_gives_that_depth():
    hits = one([-0.5, 0, 3.0], [0.5, 0, 3.0], 0.2, 0.2)
    middle = hits.depth[(hits.pixel // W == H // 2) & (np.abs(hits.pixel % W - W // 2) < 15)]
    assert len(middle) > 20
    assert np.allclose(middle, 2.8, atol=0.001)
    assert np.allclose(hits.normal[hits.depth.argmin()], [0, 0, -1], atol=0.05)


@pytest.mark.parametrize("seed", range(12))
def test_depth_agrees_with_many_spheres(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.uniform([-0.5, -0.4, 1.2], [0.5, 0.4, 3.0], (2, 3))
    if seed % 3 == 0:  # along the line of sight, as a fist that comes at the camera
        b = a * rng.uniform(0.6, 0.9)
    ra, rb = rng.uniform(0.05, 0.3, 2)
    hits = one(a, b, ra, rb)
    hit = set(hits.pixel.tolist())
    for pixel in rng.choice(hits.pixel, min(20, len(hits.pixel)), replace=False):
        x, y = (pixel % W + 0.5 - W / 2) / F, (pixel // W + 0.5 - H / 2) / F
        depth = hits.depth[hits.pixel == pixel]
        assert depth == pytest.approx(march(x, y, a, b, ra, rb), abs=1e-4)
    for pixel in rng.integers(0, W * H, 60):  # and nothing is missed
        x, y = (pixel % W + 0.5 - W / 2) / F, (pixel // W + 0.5 - H / 2) / F
        assert (int(pixel) in hit) == bool(np.isfinite(march(x, y, a, b, ra, rb)))


def test_the_nearer_limb_hides_the_farther():
    a = np.array([[-0.5, 0, 3.0], [0.0, -0.5, 2.0]])
    b = np.array([[0.5, 0, 3.0], [0.0, 0.5, 2.0]])
    hits = cast_rays(a, b, np.full((2, 2), 0.1), F, CENTRE, W, H)
    assert len(np.unique(hits.pixel)) == len(hits.pixel)
    crossing = hits.pixel == (H // 2) * W + W // 2
    assert hits.limb[crossing] == 1
    assert set(hits.limb) == {0, 1}


def test_what_is_behind_the_camera_is_not_seen():
    assert len(one([0, 0, -2.0], [0.5, 0, -3.0], 0.2, 0.2).pixel) == 0
    assert len(one([0, 0, 0.1], [0.5, 0, 0.05], 0.2, 0.2).pixel) == 0


def test_the_body_stands_in_front_of_the_room_at_its_true_distance():
    scene = draw_scene(np.random.default_rng(3))
    backdrop = render_backdrop(scene, 256, 192, 8)
    toward = scene.camera.position * [1, 0, 1]
    spot = toward / np.linalg.norm(toward) * 0.5 + [0, 0.9, 0]
    ball = Limbs(
        np.tile(spot, (2, 1, 1)), np.tile(spot + [0, 0.01, 0], (2, 1, 1)), np.full((1, 2), 0.3),
        np.ones((1, 3)), np.ones((1, 3)), np.zeros(1, int),
    )  # fmt: skip
    shake = np.array([[0, 0], [6, -4]])
    frames, depth = render(ball, scene, backdrop, (128, 96), shake)
    distance = scene.camera.to_camera(spot)
    u, v = distance[:2] / distance[2] * scene.camera.focal * 128 + [64, 48]
    for t, (dx, dy) in enumerate(shake / 2):
        seen = depth[t, round(v + dy - 0.5), round(u + dx - 0.5)]
        assert seen == pytest.approx(1000 * (distance[2] - 0.3), abs=12)
    room = backdrop.depth[8:-8:2, 8:-8:2] * 1000
    assert seen < room[round(v), round(u)] - 300
    away = np.abs(np.arange(128) - u) > 40
    assert np.median(np.abs(depth[0][:, away][depth[0][:, away] > 0] - room[:, away][depth[0][:, away] > 0])) < 2
    assert frames.dtype == np.uint8


def test_floor_depth_is_that_of_the_plane():
    scene = draw_scene(np.random.default_rng(4))
    backdrop = render_backdrop(scene, 256, 192, 0)
    rows, columns = np.nonzero(backdrop.floor)
    x = (columns + 0.5 - 128) / (scene.camera.focal * 256)
    y = (rows + 0.5 - 96) / (scene.camera.focal * 256)
    points = np.stack([x, y, np.ones_like(x)], -1) * backdrop.depth[rows, columns, None]
    height = (points @ scene.camera.rotation + scene.camera.position)[:, 1]
    assert len(height) > 1000
    assert np.abs(height).max() < 0.02


def test_edges_have_no_measurement_and_slopes_have():
    step = np.full((40, 40), 2.0, np.float32)
    step[:, 20:] = 3.0
    assert (measure(step)[:, 9:11] == 0).all()
    assert (measure(step)[:, :9] == 2000).all()
    slope = np.tile(np.linspace(1, 9, 40, dtype=np.float32), (40, 1))
    assert (measure(slope)[:, 1:-1] > 0).all()


def test_two_bones_reach_the_target_and_keep_their_lengths():
    rng = np.random.default_rng(0)
    root, target = rng.normal(size=(50, 3)), rng.normal(size=(50, 3)) * 2
    middle, end = two_bones(root, target, 0.5, 0.4, np.array([0, 1.0, 0]))
    assert np.allclose(np.linalg.norm(middle - root, axis=1), 0.5)
    assert np.allclose(np.linalg.norm(end - middle, axis=1), 0.4, atol=1e-6)
    near = np.linalg.norm(target - root, axis=1) < 0.89
    assert np.allclose(end[near], target[near], atol=2e-3)


def test_a_standing_body_is_as_tall_as_it_says():
    body = draw_body(np.random.default_rng(1))
    j = joints(body, Stance(body, np.zeros(2), np.zeros(3), 0.3).pose())
    top = j["head"][0, 1] + 0.075 * body.height
    assert top == pytest.approx(body.height, rel=0.05)
    assert j["ankles"][0, :, 1].min() > 0
