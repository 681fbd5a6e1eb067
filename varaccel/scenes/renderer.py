"""Ray casting of a scene: analytic intersections, soft shadows, contact darkening, one-bounce reflections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from varaccel.errors import InputError
from varaccel.scenes.camera import DISTANCE, HEIGHT, Array, RayGrid, project, ray_grid
from varaccel.scenes.lighting import (
    ALBEDO,
    LIGHTS,
    Light,
    ambient,
    backdrop,
    floor_albedo,
    floor_mean,
    sky_color,
)
from varaccel.scenes.primitives import Points, intersect, normal, shadow_distance
from varaccel.scenes.world import Scene, SceneObject

MIN_SIZE = 16
"""Least side of an image in pixels."""

_SUPERSAMPLING = 2
_EYE = (0.0, HEIGHT, -DISTANCE)


@dataclass(frozen=True, eq=False)
class Rendering:
    """An image with its ground truth.

    Attributes:
        image: [S, S, 3] uint8, sRGB.
        object_ids: [S, S] int8, index of the object that covers most of the pixel, -1 for floor and sky.
        visible_fraction: for each object the share of its silhouette inside the image that nothing hides.
        boxes: for each object (left, top, right, bottom) of its visible pixels as fractions of the image;
            all zero for an object that is hidden.
    """

    image: NDArray[np.uint8]
    object_ids: NDArray[np.int8]
    visible_fraction: tuple[float, ...]
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which object each ray meets first: ids [N, N] (-1 none), distance [N, N], sizes of full silhouettes."""

    ids: NDArray[np.int8]
    distance: Array
    silhouette: tuple[int, ...]

    @property
    def visible_fraction(self) -> tuple[float, ...]:
        """Share of each silhouette that is seen."""
        return tuple(
            float((self.ids == index).sum()) / size if size else 0.0
            for index, size in enumerate(self.silhouette)
        )


def silhouette_box(solid: SceneObject) -> tuple[float, float, float, float]:
    """(left, top, right, bottom), as fractions of the image, of a box that contains the projected solid."""
    reach = solid.footprint
    corners = np.array(
        [
            (solid.x + sx * reach, y, solid.z + sz * reach)
            for sx in (-1, 1)
            for y in (0.0, solid.height)
            for sz in (-1, 1)
        ],
        dtype=np.float32,
    )
    columns, rows = project(corners[:, 0], corners[:, 1], corners[:, 2])
    return float(columns.min()), float(rows.min()), float(columns.max()), float(rows.max())


def _window(box: tuple[float, float, float, float], resolution: int) -> tuple[slice, slice]:
    left, top, right, bottom = (value * resolution for value in box)
    return (
        slice(max(int(top) - 1, 0), min(math.ceil(bottom) + 1, resolution)),
        slice(max(int(left) - 1, 0), min(math.ceil(right) + 1, resolution)),
    )


def cast(scene: Scene, resolution: int) -> Visibility:
    """Nearest object along every ray of a `resolution` × `resolution` grid."""
    grid = ray_grid(resolution)
    ids = np.full((resolution, resolution), -1, dtype=np.int8)
    nearest = np.full((resolution, resolution), np.inf, dtype=np.float32)
    sizes = []
    for index, solid in enumerate(scene.objects):
        window = _window(silhouette_box(solid), resolution)
        directions = (grid.direction_x[window], grid.direction_y[window], grid.direction_z[window])
        distance = intersect(solid, _EYE, directions)
        sizes.append(int(np.isfinite(distance).sum()))
        closer = distance < nearest[window]
        ids[window][closer] = index
        np.copyto(nearest[window], distance, where=closer)
    return Visibility(ids, nearest, tuple(sizes))


def _smooth(value: Array) -> Array:
    value = np.clip(value, 0.0, 1.0)
    return value * value * (3.0 - 2.0 * value)


def _unshadowed(solid: SceneObject, light: Light, point: Points, on_floor: bool) -> Array:
    """Share of the direct light that `solid` lets through to each point, 0 to 1, with a soft edge."""
    px, py, pz = point
    cos, sin = math.cos(light.heading), math.sin(light.heading)
    dx, dz = px - solid.x, pz - solid.z
    foot = dx * cos + dz * sin  # along the shadow, at the point's own height
    across = dz * cos - dx * sin
    along = foot if on_floor else foot + py * light.lean
    distance = shadow_distance(solid, along, across, light.lean, light.heading)
    width = 0.03 + light.softness * np.maximum(foot, 0.0)
    clear = _smooth(0.5 + distance / (2.0 * width))
    if on_floor:
        return clear
    # a point on the light's side of the solid is in front of it, not in its shadow
    lx, ly, lz = light.direction
    before = -(dx * lx + (py - solid.height / 2) * ly + dz * lz)
    return np.where(before > 0, clear, np.float32(1.0))


def _contact(solid: SceneObject, x: Array, z: Array) -> Array:
    """Share of ambient light that reaches the floor around the foot of `solid`: 1 far away."""
    dx, dz = x - solid.x, z - solid.z
    if solid.shape == "cube":
        cos, sin = math.cos(solid.rotation), math.sin(solid.rotation)
        qx = np.maximum(np.abs(cos * dx - sin * dz) - solid.radius, 0.0)
        qz = np.maximum(np.abs(sin * dx + cos * dz) - solid.radius, 0.0)
        gap = np.sqrt(qx * qx + qz * qz)
    elif solid.shape == "sphere":
        r2 = dx * dx + dz * dz + solid.radius**2
        ratio = solid.radius**2 / r2
        return 1.0 - 0.75 * ratio * np.sqrt(ratio)
    else:
        gap = np.maximum(np.sqrt(dx * dx + dz * dz) - solid.radius, 0.0)
    depth = 0.5 if solid.shape == "cone" else 0.6
    near = 1.0 / (1.0 + gap * (2.2 / solid.height))
    near2 = near * near
    return 1.0 - depth * near2 * near2


def _floor_window(solid: SceneObject, light: Light, grid: RayGrid, resolution: int) -> tuple[slice, slice]:
    """Part of the image in which `solid` may change the floor."""
    reach = solid.footprint * 1.1 + 1.4
    shift = solid.height * light.lean
    end_x, end_z = solid.x + math.cos(light.heading) * shift, solid.z + math.sin(light.heading) * shift
    low_z = max(min(solid.z, end_z) - reach, -DISTANCE + 1.0)
    corners = [
        (x, z)
        for x in (min(solid.x, end_x) - reach, max(solid.x, end_x) + reach)
        for z in (low_z, max(solid.z, end_z) + reach)
    ]
    x, z = np.array(corners, dtype=np.float32).T
    columns, rows = project(x, np.zeros_like(x), z)
    bottom = 1.0 if low_z <= -DISTANCE + 1.0 else float(rows.max())
    rows_slice, columns_slice = _window(
        (float(columns.min()), float(rows.min()), float(columns.max()), bottom), resolution
    )
    return slice(max(rows_slice.start, grid.horizon), rows_slice.stop), columns_slice


def _paint_floor(scene: Scene, light: Light, resolution: int) -> Array:
    """Floor and sky [3, N, N] with the shadows of all objects."""
    grid = ray_grid(resolution)
    empty = backdrop(scene.floor, scene.time_of_day, resolution)
    clear = np.ones((resolution, resolution), dtype=np.float32)
    open_sky = np.ones((resolution, resolution), dtype=np.float32)
    zero = np.zeros((), dtype=np.float32)
    for solid in scene.objects:
        window = _floor_window(solid, light, grid, resolution)
        x, z = grid.floor_x[window], grid.floor_z[window]
        clear[window] *= _unshadowed(solid, light, (x, zero, z), on_floor=True)
        open_sky[window] *= _contact(solid, x, z)
    return empty.fixed + empty.direct * (clear * (0.25 + 0.75 * open_sky)) + empty.ambient * open_sky


def _facing(light: Light, normals: Points) -> Array:
    lx, ly, lz = light.direction
    return np.maximum(normals[0] * lx + normals[1] * ly + normals[2] * lz, 0.0)


def _incident(scene: Scene, index: int, light: Light, point: Points, normals: Points) -> Array:
    """Light [3, n] that falls on points of object `index`, ambient and direct."""
    direct = _facing(light, normals)
    ground = np.clip(point[1] / (0.9 * scene.objects[index].height), 0.0, 1.0)
    open_sky = 0.62 + 0.38 * _smooth(0.15 + 0.85 * ground)
    for other, solid in enumerate(scene.objects):
        if other == index:
            continue
        direct = direct * _unshadowed(solid, light, point, on_floor=False)
        middle = solid.height / 2
        dx, dy, dz = solid.x - point[0], middle - point[1], solid.z - point[2]
        square = np.maximum(dx * dx + dy * dy + dz * dz, middle * middle)
        toward = np.maximum((normals[0] * dx + normals[1] * dy + normals[2] * dz) / np.sqrt(square), 0.0)
        open_sky = open_sky * (1.0 - 0.8 * toward * (middle * middle) / square)
    around = ambient(light, scene.floor, normals[1]) * open_sky
    for channel in range(3):
        around[channel] += direct * np.float32(light.color[channel])
    return around


def _surroundings(scene: Scene, index: int, light: Light, point: Points, ray: Points) -> Array:
    """What is seen [3, n] from points of object `index` along `ray`: other objects, the floor or the sky."""
    px, py, pz = point
    rx, ry, rz = ray
    color = sky_color(scene.time_of_day, rx, ry)
    nearest = np.full(rx.shape, np.inf, dtype=np.float32)
    down = np.flatnonzero(ry < -1e-3)
    if down.size:
        fall = py[down] / -ry[down]
        x, z = px[down] + fall * rx[down], pz[down] + fall * rz[down]
        nearest[down] = fall
        # a rough mirror: the floor's pattern is mostly blurred and its colour subdued, or one would seem to
        # see the floor through the solid
        mean = floor_mean(scene.floor)
        gray = sum(mean) / 3.0
        pattern = floor_albedo(scene.floor, x, z, fall * 2.0)
        albedo = [0.25 * pattern[c] + np.float32(0.40 * mean[c] + 0.35 * gray) for c in range(3)]
        clear = np.ones_like(x)
        open_sky = np.ones_like(x)
        zero = np.zeros((), dtype=np.float32)
        for solid in scene.objects:
            clear *= _unshadowed(solid, light, (x, zero, z), on_floor=True)
            open_sky *= _contact(solid, x, z)
        haze = 1.0 - np.exp(-((fall / 14.0) ** 2))
        for channel in range(3):
            direct = clear * np.float32(light.color[channel] * light.direction[1])
            lit = (direct + np.float32(light.ambient_up[channel])) * open_sky * albedo[channel]
            color[channel, down] = lit + haze * (np.float32(light.horizon[channel]) - lit)
    for other, solid in enumerate(scene.objects):
        if other == index:
            continue
        distance = intersect(solid, point, ray)
        hit = np.flatnonzero(distance < nearest)
        if not hit.size:
            continue
        reach = distance[hit]
        nearest[hit] = reach
        there = (px[hit] + reach * rx[hit], py[hit] + reach * ry[hit], pz[hit] + reach * rz[hit])
        normals = normal(solid, there)
        facing = _facing(light, normals)
        around = ambient(light, scene.floor, normals[1])
        for channel in range(3):
            incident = around[channel] * 0.85 + facing * np.float32(light.color[channel])
            color[channel, hit] = incident * np.float32(ALBEDO[solid.color][channel])
    return color


def _shade(scene: Scene, index: int, light: Light, point: Points, view: Points) -> Array:
    """Colour [3, n] of visible points of object `index`; `view` holds the unit directions of their rays."""
    solid = scene.objects[index]
    normals = normal(solid, point)
    incident = _incident(scene, index, light, point, normals)
    albedo = np.asarray(ALBEDO[solid.color], dtype=np.float32)[:, None]
    if solid.material == "matte":
        return incident * albedo
    nx, ny, nz = normals
    vx, vy, vz = view
    cosine = vx * nx + vy * ny + vz * nz
    rx, ry, rz = vx - 2 * cosine * nx, vy - 2 * cosine * ny, vz - 2 * cosine * nz
    mirrored = _surroundings(scene, index, light, point, (rx, ry, rz))
    # half the surroundings' hue is taken out, so that a pink solid under a blue sky still reads as pink
    luminance = 0.25 * mirrored[0] + 0.6 * mirrored[1] + 0.15 * mirrored[2]
    mirrored = 0.4 * mirrored + 0.6 * luminance
    grazing = np.clip(1.0 + cosine, 0.0, 1.0)
    grazing2 = grazing * grazing
    fresnel = grazing2 * grazing2 * grazing
    lx, ly, lz = light.direction
    aligned = np.maximum(rx * lx + ry * ly + rz * lz, 0.0)
    shine = np.asarray(light.color, dtype=np.float32)[:, None]
    peak = max(light.color)
    if solid.material == "glossy":
        reflectance = 0.07 + 0.55 * fresnel
        spot = aligned**60 * (1.5 / peak)
        return incident * albedo * (1.0 - reflectance) + mirrored * reflectance + shine * spot * 0.9
    # metal: the mirror image takes the metal's colour; a little diffuse light keeps that colour readable, and
    # bright and dark sides of the surroundings give the streaks by which the eye tells metal from plastic
    level = np.maximum(np.sqrt(rx * rx + rz * rz), 1e-4)
    side = (rx * lx + rz * lz) / (level * math.hypot(lx, lz))
    streak = 0.35 + 1.35 * np.maximum(side, 0.0) ** 5 + 0.45 * np.maximum(-side, 0.0) ** 3
    band = 1.0 - 0.55 * np.exp(-(((ry - 0.02) / 0.10) ** 2))
    upward = np.clip(0.5 + 1.6 * ry, 0.0, 1.0)
    streak = (streak + upward * (1.25 - streak)) * band
    tint = 0.06 + 0.90 * albedo
    reflectance = tint + (1.0 - tint) * (0.35 * fresnel)
    streak = streak * (0.75 + 0.6 * point[1] / solid.height)
    spot = aligned**18 * (0.8 / peak)
    return incident * albedo * 0.45 + mirrored * streak * reflectance + shine * spot * (0.2 + 0.8 * tint)


def _tone_curve() -> NDArray[np.uint8]:
    """sRGB bytes for linear values 0 to 4 in 8192 steps, with a soft shoulder above 0.6."""
    linear = np.arange(8192) / 2048.0
    shoulder = np.where(linear < 0.6, linear, 0.6 + 0.4 * (1.0 - np.exp(-(linear - 0.6) / 0.4)))
    srgb = np.where(shoulder <= 0.0031308, 12.92 * shoulder, 1.055 * shoulder ** (1 / 2.4) - 0.055)
    return np.round(np.clip(srgb, 0.0, 1.0) * 255.0).astype(np.uint8)


_TONE = _tone_curve()


def check_size(size: int) -> None:
    """Raise InputError unless images of `size` × `size` pixels can be rendered."""
    if size < MIN_SIZE:
        raise InputError(f"an image needs at least {MIN_SIZE} pixels a side, got {size}; pass a larger size.")


def render(scene: Scene, size: int = 128) -> Rendering:
    """The image of `scene` at `size` × `size` pixels, with the buffers that tell what is where.

    Raises:
        InputError: `size` is below `MIN_SIZE`.
    """
    check_size(size)
    resolution = size * _SUPERSAMPLING
    light = LIGHTS[scene.time_of_day]
    grid = ray_grid(resolution)
    seen = cast(scene, resolution)
    color = _paint_floor(scene, light, resolution).reshape(3, -1)
    flat_ids = seen.ids.reshape(-1)
    flat_distance = seen.distance.reshape(-1)
    directions = (grid.direction_x.reshape(-1), grid.direction_y.reshape(-1), grid.direction_z.reshape(-1))
    for index in range(len(scene.objects)):
        where = np.flatnonzero(flat_ids == index)
        if not where.size:
            continue
        view = (directions[0][where], directions[1][where], directions[2][where])
        reach = flat_distance[where]
        point = (
            _EYE[0] + reach * view[0],
            np.float32(_EYE[1]) + reach * view[1],
            np.float32(_EYE[2]) + reach * view[2],
        )
        color[:, where] = _shade(scene, index, light, point, view)
    # averaging tone-mapped values keeps bright edges smooth
    levels = _TONE[np.clip(color * 2048.0, 0.0, 8191.0).astype(np.int16)]
    blocks = levels.reshape(3, size, _SUPERSAMPLING, size, _SUPERSAMPLING).astype(np.uint16)
    summed = blocks[:, :, 0, :, 0] + blocks[:, :, 0, :, 1] + blocks[:, :, 1, :, 0] + blocks[:, :, 1, :, 1]
    image = np.ascontiguousarray(((summed + 2) // 4).astype(np.uint8).transpose(1, 2, 0))
    object_ids = _pixel_ids(seen.ids, len(scene.objects), size)
    boxes = tuple(_box(object_ids == index, size) for index in range(len(scene.objects)))
    return Rendering(image, object_ids, seen.visible_fraction, boxes)


def _pixel_ids(ids: NDArray[np.int8], count: int, size: int) -> NDArray[np.int8]:
    """Object that covers most of each pixel's samples; ties go to the object over the background."""
    blocks = ids.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    result = np.full((size, size), -1, dtype=np.int8)
    most = np.full((size, size), _SUPERSAMPLING**2 // 2 - 1, dtype=np.int64)
    for index in range(count):
        covered = (blocks == index).sum(axis=(1, 3))
        more = covered > most
        result[more] = index
        np.copyto(most, covered, where=more)
    return result


def _box(mask: NDArray[np.bool_], size: int) -> tuple[float, float, float, float]:
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return 0.0, 0.0, 0.0, 0.0
    return (
        float(columns[0]) / size,
        float(rows[0]) / size,
        float(columns[-1] + 1) / size,
        float(rows[-1] + 1) / size,
    )
