"""A source video's fixed facts: the camera, the light, the room, the two people. One scene is one group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossgate.clips.synth.figure import Body, draw_body

FIGURE_SHARE = 0.78  # of the picture's height that a person of 1.75 m fills at the stage's centre, on average


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        position: (3,) metres.
        rotation: (3, 3) rows are right, down and forward in world coordinates.
        focal: focal length in picture widths.
    """

    position: np.ndarray
    rotation: np.ndarray
    focal: float

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """Returns (..., 3) points as right, down, forward of the camera, metres."""
        return (points - self.position) @ self.rotation.T

    @staticmethod
    def looking(position: np.ndarray, target: np.ndarray, focal: float, roll: float = 0.0) -> Camera:
        """Returns a camera at ``position`` with ``target`` in the middle of the picture."""
        forward = (target - position) / np.linalg.norm(target - position)
        right = np.cross(forward, [0.0, 1.0, 0.0])
        right /= np.linalg.norm(right)
        down = np.cross(forward, right)
        cos, sin = np.cos(roll), np.sin(roll)
        return Camera(position, np.stack([cos * right + sin * down, cos * down - sin * right, forward]), focal)


@dataclass(frozen=True)
class Room:
    """Floor, walls and what stands about.

    Attributes:
        yaw: of the walls against the camera, radians.
        back, side: metres from the stage to the back wall and the side wall (negative: on the left).
        floor, wall: names in `backdrop.TEXTURES`; floor_colour, wall_colour: (3,) RGB in 0..1.
        boxes: (K, 6) furniture in room axes: x, z of the centre, half width, half depth, height, bottom.
        box_colours: (K, 3). pictures: (P, 4) on the back wall: centre x, y, half width, half height.
        picture_colours: (P, 2, 3).
        seed: of the fine texture.
    """

    yaw: float
    back: float
    side: float
    floor: str
    wall: str
    floor_colour: np.ndarray
    wall_colour: np.ndarray
    boxes: np.ndarray
    box_colours: np.ndarray
    pictures: np.ndarray
    picture_colours: np.ndarray
    seed: int


@dataclass(frozen=True)
class Scene:
    """Everything that the clips of one group share.

    Attributes:
        turn: of the stage about the vertical, radians; 0 shows a pair from the side.
        light: (3,) towards the lamp. ambient: share of light without direction. tint: (3,) colour of the light.
        shake: standard deviation of the camera's unrest, picture widths. grain: of the sensor's noise, 8-bit levels.
        hum, ambience: loudness of the mains and of the room.
    """

    camera: Camera
    room: Room
    bodies: tuple[Body, Body]
    turn: float
    light: np.ndarray
    ambient: float
    tint: np.ndarray
    shake: float
    grain: float
    hum: float
    ambience: float


def _draw_room(rng: np.random.Generator) -> Room:
    def muted(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high) * (1 + rng.uniform(-0.13, 0.13, 3))

    back, side = rng.uniform(1.6, 3.6), rng.choice([-1, 1]) * rng.uniform(2.0, 4.0)
    boxes = []
    for _ in range(int(rng.integers(1, 5))):
        x = rng.choice([-1, 1]) * rng.uniform(0.8, 2.4)
        half_depth = rng.uniform(0.15, 0.4)
        z = -back + half_depth + rng.uniform(0.0, 0.4)
        boxes.append([x, z, rng.uniform(0.15, 0.55), half_depth, rng.uniform(0.35, 1.7), 0.0])
    pictures = [
        [rng.uniform(-2.2, 2.2), rng.uniform(1.3, 1.9), rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.5)]
        for _ in range(int(rng.integers(0, 3)))
    ]
    return Room(
        yaw=rng.uniform(-0.45, 0.45), back=back, side=side,
        floor=str(rng.choice(["planks", "tiles", "carpet", "concrete"])),
        wall=str(rng.choice(["plain", "bricks", "stripes", "panels"])),
        floor_colour=muted(0.35, 0.62), wall_colour=muted(0.55, 0.85),
        boxes=np.array(boxes), box_colours=np.stack([muted(0.3, 0.65) for _ in boxes]),
        pictures=np.array(pictures).reshape(-1, 4), picture_colours=rng.uniform(0.1, 0.95, (len(pictures), 2, 3)),
        seed=int(rng.integers(2**31)),
    )  # fmt: skip


def draw_scene(rng: np.random.Generator, aspect: float = 4 / 3) -> Scene:
    """Returns a random scene for pictures of the given width over height."""
    focal = rng.uniform(0.95, 1.5)
    distance = focal * aspect * 1.75 / (FIGURE_SHARE * rng.uniform(0.9, 1.08))
    position = np.array([rng.uniform(-0.3, 0.3), rng.uniform(1.0, 2.3), 0.0])
    position[2] = np.sqrt(max(distance**2 - (position[1] - 0.9) ** 2, 1.0))
    camera = Camera.looking(position, np.array([0.0, 0.88, 0.0]), focal, roll=rng.normal(0, 0.02))
    light = np.array([rng.uniform(-0.9, 0.9), rng.uniform(0.7, 1.3), rng.uniform(0.1, 0.9)])
    warmth = rng.uniform(-0.1, 0.1)
    return Scene(
        camera=camera, room=_draw_room(rng), bodies=(draw_body(rng), draw_body(rng)),
        turn=rng.uniform(-0.5, 0.5), light=light / np.linalg.norm(light), ambient=rng.uniform(0.3, 0.5),
        tint=np.array([1 + warmth, 1.0, 1 - warmth]) * rng.uniform(0.9, 1.1), shake=rng.uniform(0, 0.004),
        grain=rng.uniform(1.0, 4.0), hum=rng.uniform(0, 0.003), ambience=rng.uniform(0.002, 0.008),
    )  # fmt: skip
