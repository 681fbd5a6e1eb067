"""The four solids: ray intersection, surface normal and the shadow each throws on the floor.

All solids are convex and stand upright, so a ray meets each in one interval, a surface never shadows itself
beyond facing away from the light, and the normal is a function of the surface point alone.
"""

from __future__ import annotations

import math

import numpy as np

from varaccel.scenes.camera import Array
from varaccel.scenes.world import SceneObject

_BEVEL = 0.08
"""Part of the half edge over which normals of cubes and cylinder rims turn; it rounds edges in shading."""

Points = tuple[Array, Array, Array]
Scalars = tuple[float, float, float]


def _interval(entry: Array, leave: Array) -> Array:
    return np.where((entry < leave) & (entry > 1e-4), entry, np.float32(np.inf))


def _slab(origin: Array | float, direction: Array, low: float, high: float) -> tuple[Array, Array]:
    safe = np.where(np.abs(direction) < 1e-7, np.float32(1e-7), direction)
    first = (low - origin) / safe
    second = (high - origin) / safe
    return np.minimum(first, second), np.maximum(first, second)


def intersect(solid: SceneObject, origin: Points | Scalars, direction: Points) -> Array:
    """Distance along each ray to its entry into `solid`, infinite where it misses.

    `direction` holds unit vectors as three arrays of one shape; `origin` three arrays of it or three numbers,
    outside the solid.
    """
    dx, dy, dz = direction
    ox, oy, oz = origin[0] - solid.x, origin[1], origin[2] - solid.z
    radius, height = solid.radius, solid.height
    if solid.shape == "sphere":
        oy = oy - radius
        b = ox * dx + oy * dy + oz * dz
        c = ox * ox + oy * oy + oz * oz - radius * radius
        root = b * b - c
        entry = -b - np.sqrt(np.maximum(root, 0.0))
        return np.where((root > 0) & (entry > 1e-4), entry, np.float32(np.inf))
    if solid.shape == "cube":
        cos, sin = math.cos(solid.rotation), math.sin(solid.rotation)
        entry, leave = _slab(oy, dy, 0.0, height)
        for o, d in (
            (cos * ox - sin * oz, cos * dx - sin * dz),
            (sin * ox + cos * oz, sin * dx + cos * dz),
        ):
            near, far = _slab(o, d, -radius, radius)
            entry = np.maximum(entry, near)
            leave = np.minimum(leave, far)
        return _interval(entry, leave)
    entry, leave = _slab(oy, dy, 0.0, height)
    if solid.shape == "cylinder":
        a = np.maximum(dx * dx + dz * dz, 1e-9)
        b = ox * dx + oz * dz
        c = ox * ox + oz * oz - radius * radius
        square = b * b - a * c
        root = np.sqrt(np.maximum(square, 0.0))
        entry = np.maximum(entry, (-b - root) / a)
        leave = np.where(square > 0, np.minimum(leave, (-b + root) / a), np.float32(-np.inf))
        return _interval(entry, leave)
    slope = radius / height
    to_tip = height - oy
    a = dx * dx + dz * dz - slope * slope * dy * dy
    a = np.where(np.abs(a) < 1e-6, np.float32(1e-6), a)
    b = ox * dx + oz * dz + slope * slope * to_tip * dy
    c = ox * ox + oz * oz - slope * slope * to_tip * to_tip
    square = b * b - a * c
    root = np.sqrt(np.maximum(square, 0.0))
    first, second = (-b - root) / a, (-b + root) / a
    near, far = np.minimum(first, second), np.maximum(first, second)
    # a steep ray (a < 0) is inside the double cone outside its roots: below the tip after the later root when
    # it falls, before the earlier root when it climbs
    steep = a < 0
    near, far = (
        np.where(steep, np.where(dy < 0, far, np.float32(-np.inf)), near),
        np.where(steep, np.where(dy < 0, np.float32(np.inf), near), far),
    )
    entry = np.maximum(entry, near)
    leave = np.where(square > 0, np.minimum(leave, far), np.float32(-np.inf))
    return _interval(entry, leave)


def _beveled(*parts: Array) -> list[Array]:
    """Unit normal of the box [-1, 1]^k at points of its surface, turned to the neighbour near an edge."""
    sizes = [np.abs(part) for part in parts]
    largest = np.maximum.reduce(sizes)
    # the face keeps a weight of its own, so that an edge never turns so far as to show what lies behind it
    weights = [
        np.sign(part) * (np.maximum(size - (1 - _BEVEL), 0.0) + 0.8 * _BEVEL * (size >= largest))
        for part, size in zip(parts, sizes, strict=True)
    ]
    length = np.sqrt(sum(weight * weight for weight in weights))
    return [(weight / length).astype(np.float32) for weight in weights]


def normal(solid: SceneObject, point: Points) -> Points:
    """Outward unit normals at points of the surface; edges of cubes and cylinders are rounded."""
    px, py, pz = point[0] - solid.x, point[1], point[2] - solid.z
    radius, height = solid.radius, solid.height
    if solid.shape == "sphere":
        return px / radius, (py - radius) / radius, pz / radius
    if solid.shape == "cone":
        around = np.maximum(np.sqrt(px * px + pz * pz), 1e-5)
        length = math.hypot(height, radius)
        side, up = height / length, radius / length
        return px / around * side, np.full_like(px, up), pz / around * side
    middle = height / 2
    level = (py - middle) / middle
    if solid.shape == "cylinder":
        around = np.maximum(np.sqrt(px * px + pz * pz), 1e-5)
        outward, upward = _beveled(around / radius, level)
        return px / around * outward, upward, pz / around * outward
    cos, sin = math.cos(solid.rotation), math.sin(solid.rotation)
    nx, ny, nz = _beveled((cos * px - sin * pz) / radius, level, (sin * px + cos * pz) / radius)
    return cos * nx + sin * nz, ny, -sin * nx + cos * nz


def shadow_distance(solid: SceneObject, along: Array, across: Array, lean: float, heading: float) -> Array:
    """Signed distance on the floor to the outline of the shadow of `solid`, negative inside.

    `along` and `across` are floor coordinates relative to the solid's foot, `along` pointing away from the
    light; `lean` is the shadow length of a unit height and `heading` the angle of the `along` axis in the
    (x, z) plane.
    """
    radius, height = solid.radius, solid.height
    if solid.shape == "sphere":
        stretch2 = 1 + lean * lean
        a = along - radius * lean
        size = np.sqrt(a * a / stretch2 + across * across)
        slope = np.sqrt(a * a / (stretch2 * stretch2) + across * across)
        return (size - radius) * size / np.maximum(slope, 1e-4)
    reach = height * lean
    if solid.shape == "cylinder":
        beyond = along - np.clip(along, 0.0, reach)
        return np.sqrt(beyond * beyond + across * across) - radius
    if solid.shape == "cone":
        side = np.abs(across)
        disc = np.sqrt(along * along + across * across) - radius
        if reach <= radius:
            return disc
        sine = radius / reach
        cosine = math.sqrt(1 - sine * sine)
        where = along * cosine - side * sine
        tip = along - reach
        return np.where(
            where < 0,
            disc,
            np.where(
                where > cosine * reach,
                np.sqrt(tip * tip + across * across),
                side * cosine + along * sine - radius,
            ),
        )
    # a cube's shadow is its square footprint swept along a segment: three pairs of parallel edges
    turn = heading + solid.rotation
    cos, sin = math.cos(turn), math.sin(turn)
    a = along - reach / 2
    x, z = cos * a - sin * across, sin * a + cos * across
    edge_x = np.abs(x) - (radius + abs(cos) * reach / 2)
    edge_z = np.abs(z) - (radius + abs(sin) * reach / 2)
    edge_side = np.abs(across) - radius * (abs(cos) + abs(sin))
    return np.maximum(np.maximum(edge_x, edge_z), edge_side)
