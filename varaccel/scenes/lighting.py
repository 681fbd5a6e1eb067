"""Light and surroundings: the three times of day, the sky, the floors and the colours of the objects.

All colours are linear RGB. Colours of many points are stored as [3, ...], so that arithmetic runs over whole
planes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from varaccel.errors import unknown_name
from varaccel.scenes.camera import Array, ray_grid

RGB = tuple[float, float, float]

ALBEDO: dict[str, RGB] = {
    "red": (0.72, 0.025, 0.03),
    "green": (0.03, 0.40, 0.05),
    "blue": (0.025, 0.09, 0.74),
    "yellow": (0.92, 0.70, 0.02),
    "orange": (0.95, 0.25, 0.008),
    "purple": (0.31, 0.03, 0.47),
    "pink": (0.95, 0.28, 0.50),
    "cyan": (0.04, 0.68, 0.78),
    "brown": (0.145, 0.055, 0.022),
    "white": (0.90, 0.90, 0.88),
    "gray": (0.19, 0.19, 0.20),
    "black": (0.012, 0.012, 0.013),
}

_FLOOR_COLOR: dict[str, tuple[RGB, RGB]] = {
    "white": ((0.66, 0.65, 0.63), (0.66, 0.65, 0.63)),
    "gray": ((0.26, 0.26, 0.27), (0.26, 0.26, 0.27)),
    "blue": ((0.10, 0.19, 0.42), (0.10, 0.19, 0.42)),
    "green": ((0.15, 0.30, 0.12), (0.15, 0.30, 0.12)),
    "checker": ((0.62, 0.60, 0.56), (0.13, 0.13, 0.15)),
    "wood": ((0.52, 0.32, 0.17), (0.36, 0.20, 0.10)),
}
_PLANK = 0.85
_CELL = 1.1


@dataclass(frozen=True)
class Light:
    """One time of day: a directional light with a soft edge and a hemisphere of ambient light."""

    direction: tuple[float, float, float]
    color: RGB
    ambient_up: RGB
    ambient_down: float
    """Share of the floor's colour that comes back up as ambient light."""
    horizon: RGB
    zenith: RGB
    softness: float
    """Width of the shadow's edge per unit of distance from what throws it."""

    @property
    def lean(self) -> float:
        """Length of the shadow of a unit height."""
        return math.hypot(self.direction[0], self.direction[2]) / self.direction[1]

    @property
    def heading(self) -> float:
        """Angle in the (x, z) plane in which shadows fall."""
        return math.atan2(-self.direction[2], -self.direction[0])


def _unit(x: float, y: float, z: float) -> tuple[float, float, float]:
    length = math.sqrt(x * x + y * y + z * z)
    return x / length, y / length, z / length


LIGHTS: dict[str, Light] = {
    "noon": Light(
        direction=_unit(-0.50, 1.0, -0.38),
        color=(1.02, 0.98, 0.90),
        ambient_up=(0.40, 0.45, 0.54),
        ambient_down=0.30,
        horizon=(0.52, 0.74, 0.98),
        zenith=(0.10, 0.30, 0.82),
        softness=0.10,
    ),
    "sunset": Light(
        direction=_unit(-0.90, 0.50, -0.42),
        color=(1.18, 0.85, 0.57),
        ambient_up=(0.29, 0.30, 0.44),
        ambient_down=0.25,
        horizon=(1.0, 0.46, 0.16),
        zenith=(0.24, 0.14, 0.38),
        softness=0.09,
    ),
    "night": Light(
        direction=_unit(0.55, 0.85, -0.55),
        color=(0.47, 0.50, 0.60),
        ambient_up=(0.14, 0.155, 0.225),
        ambient_down=0.25,
        horizon=(0.035, 0.06, 0.15),
        zenith=(0.006, 0.012, 0.045),
        softness=0.12,
    ),
}

_SKY_RISE = {"noon": 7.0, "sunset": 7.0, "night": 6.0}


def sky_color(time_of_day: str, direction_x: Array, direction_y: Array) -> Array:
    """Sky seen along unit directions, [3, ...]; sun, moon and stars are not part of it."""
    light = LIGHTS[time_of_day]
    mix = 1.0 - np.exp(-_SKY_RISE[time_of_day] * np.maximum(direction_y, 0.0))
    if time_of_day == "sunset":
        glow = np.clip(0.5 - direction_x * 1.2, 0.0, 1.0)
        mix = mix * (1.0 - 0.35 * glow)
    mix = mix.astype(np.float32)
    return np.stack(
        [
            np.float32(low) + mix * np.float32(high - low)
            for low, high in zip(light.horizon, light.zenith, strict=True)
        ]
    )


def floor_albedo(floor: str, x: Array, z: Array, distance: Array | float) -> Array:
    """Colour [3, ...] of the floor at points (x, z); patterns fade to their mean with `distance`."""
    if floor not in _FLOOR_COLOR:
        raise unknown_name("floor", floor, _FLOOR_COLOR)
    first, second = _FLOOR_COLOR[floor]
    if floor == "checker":
        odd = (np.floor(x / _CELL + 0.5) + np.floor(z / _CELL + 0.5)) % 2.0
        mix = 0.5 + (odd - 0.5) * np.clip(1.6 - np.asarray(distance) * 0.06, 0.0, 1.0)
    elif floor == "wood":
        plank = np.floor(x / _PLANK)
        tint = np.mod(np.abs(plank * 0.618 + 0.3), 1.0)
        inside = x / _PLANK - plank
        grain = 0.5 + 0.5 * np.sin(inside * 19.0 + plank * 5.1 + 1.6 * np.sin(z * 0.9 + plank * 2.3))
        gap = np.minimum(inside, 1.0 - inside) < 0.025
        fade = np.clip(1.6 - np.asarray(distance) * 0.06, 0.0, 1.0)
        mix = 0.5 + (0.6 * tint + 0.35 * grain - 0.45 + 0.9 * gap) * fade
    else:
        plain = np.asarray(first, dtype=np.float32).reshape(3, *([1] * x.ndim))
        return np.broadcast_to(plain, (3, *x.shape))
    mix = mix.astype(np.float32)
    return np.stack([np.float32(a) + mix * np.float32(b - a) for a, b in zip(first, second, strict=True)])


def floor_mean(floor: str) -> RGB:
    """Mean colour of a floor."""
    first, second = _FLOOR_COLOR[floor]
    return (first[0] + second[0]) / 2, (first[1] + second[1]) / 2, (first[2] + second[2]) / 2


def ambient(light: Light, floor: str, up: Array) -> Array:
    """Ambient light [3, ...] on surfaces whose normal has the vertical part `up`."""
    sky_part = 0.5 + 0.5 * up
    mean = floor_mean(floor)
    planes = []
    for channel in range(3):
        above = light.ambient_up[channel]
        below = light.ambient_down * mean[channel] * (light.color[channel] + above)
        planes.append(np.float32(below) + sky_part * np.float32(above - below))
    return np.stack(planes)


@dataclass(frozen=True, eq=False)
class Backdrop:
    """Floor and sky without objects, [3, N, N] each: what direct and ambient light add, and all the rest."""

    direct: Array
    ambient: Array
    fixed: Array


def _stars(columns: Array, rows: Array) -> Array:
    """Brightness of a fixed field of small stars, at fractions of the image."""
    generator = np.random.default_rng(7)
    field = np.zeros_like(columns)
    for _ in range(26):
        x, y = generator.uniform(0.02, 0.98), generator.uniform(0.005, 0.135)
        strength = generator.uniform(0.35, 1.0)
        square = (columns - x) ** 2 + (rows - y) ** 2
        field += strength * np.exp(-square / (2 * 0.0032**2))
    return field


@lru_cache(maxsize=36)
def backdrop(floor: str, time_of_day: str, resolution: int) -> Backdrop:
    """The empty world as seen by the camera."""
    light = LIGHTS[time_of_day]
    grid = ray_grid(resolution)
    ground = np.arange(resolution)[:, None] >= grid.horizon
    sky = sky_color(time_of_day, grid.direction_x, grid.direction_y)
    steps = ((np.arange(resolution) + 0.5) / resolution).astype(np.float32)
    columns, rows = np.broadcast_to(steps, (resolution, resolution)), steps[:, None]
    if time_of_day == "night":
        sky = sky + np.float32(0.9) * _stars(columns, rows)
        radius = np.sqrt((columns - 0.86) ** 2 + (rows - 0.07) ** 2)
        shade = np.sqrt((columns - 0.838) ** 2 + (rows - 0.058) ** 2)
        moon = np.clip((0.042 - radius) / 0.006, 0, 1) * np.clip((shade - 0.036) / 0.006, 0, 1)
        for channel, value in enumerate((0.95, 0.92, 0.75)):
            sky[channel] += moon * np.float32(value)
    elif time_of_day == "sunset":
        radius = np.sqrt((columns - 0.15) ** 2 + (rows - 0.115) ** 2)
        sun = np.clip((0.05 - radius) / 0.006, 0, 1)
        halo = np.exp(-((radius / 0.16) ** 2))
        for channel, value in enumerate((1.0, 0.75, 0.30)):
            sky[channel] += halo * np.float32(0.45 * value)
            sky[channel] += sun * (np.float32((1.0, 0.86, 0.45)[channel]) * 1.6 - sky[channel])
    albedo = floor_albedo(floor, grid.floor_x, grid.floor_z, grid.floor_distance)
    haze = np.where(ground, 1.0 - np.exp(-((grid.floor_distance / 40.0) ** 2)), 1.0).astype(np.float32)
    clear = 1.0 - haze
    facing = light.direction[1]
    direct = np.stack([albedo[c] * clear * np.float32(light.color[c] * facing) for c in range(3)])
    around = np.stack([albedo[c] * clear * np.float32(light.ambient_up[c]) for c in range(3)])
    horizon = np.asarray(light.horizon, dtype=np.float32)[:, None, None]
    fixed = np.where(ground, horizon * haze, sky)
    return Backdrop(direct.astype(np.float32), around.astype(np.float32), fixed.astype(np.float32))
