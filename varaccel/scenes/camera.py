"""The one fixed pinhole camera of the world: rays of a pixel grid and projection of points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
"""Numbers of images and points; float32 in practice, for speed."""

HEIGHT = 3.4
DISTANCE = 6.4
PITCH = math.radians(17.0)
TANGENT = math.tan(math.radians(22.0))
"""Tangent of half the field of view; the image is square."""

_SIN = math.sin(PITCH)
_COS = math.cos(PITCH)


@dataclass(frozen=True, eq=False)
class RayGrid:
    """Unit directions [N, N] of the rays through the pixel centres and their landing points on the floor."""

    direction_x: Array
    direction_y: Array
    direction_z: Array
    floor_x: Array
    floor_z: Array
    floor_distance: Array
    horizon: int
    """First row whose rays meet the floor; rows above it see the sky."""


@lru_cache(maxsize=8)
def ray_grid(resolution: int) -> RayGrid:
    """Rays of a `resolution` × `resolution` image. Floor values of sky rows are 0."""
    steps = (np.arange(resolution) + 0.5) / resolution * 2.0 - 1.0
    across = steps[None, :] * TANGENT
    upwards = -steps[:, None] * TANGENT
    x = np.broadcast_to(across, (resolution, resolution))
    y = np.broadcast_to(-_SIN + upwards * _COS, (resolution, resolution))
    z = np.broadcast_to(_COS + upwards * _SIN, (resolution, resolution))
    length = np.sqrt(x * x + y * y + z * z)
    x, y, z = x / length, y / length, z / length
    down = y < -1e-4
    distance = np.where(down, -HEIGHT / np.where(down, y, -1.0), 0.0)
    return RayGrid(
        direction_x=x.astype(np.float32),
        direction_y=y.astype(np.float32),
        direction_z=z.astype(np.float32),
        floor_x=(distance * x).astype(np.float32),
        floor_z=np.where(down, distance * z - DISTANCE, 0.0).astype(np.float32),
        floor_distance=distance.astype(np.float32),
        horizon=int(np.argmax(down[:, 0])),
    )


def project(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Screen position of world points as fractions of the image: column from the left, row from the top."""
    depth = -(y - HEIGHT) * _SIN + (z + DISTANCE) * _COS
    upwards = (y - HEIGHT) * _COS + (z + DISTANCE) * _SIN
    scale = 0.5 / (TANGENT * np.maximum(depth, 0.05))
    return 0.5 + x * scale, 0.5 - upwards * scale
