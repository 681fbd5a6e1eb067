"""Drawing scenes: attributes at random, positions by rejection until everything a caption may say is true."""

from __future__ import annotations

import numpy as np

from varaccel.errors import InputError
from varaccel.scenes.renderer import cast, silhouette_box
from varaccel.scenes.world import (
    COLORS,
    FLOORS,
    INVERSE_RELATION,
    MATERIALS,
    RELATIONS,
    SHAPES,
    SIZES,
    TIMES,
    Scene,
    SceneObject,
)

MIN_VISIBLE = 0.35
"""Every object of a sampled scene shows at least this share of its silhouette."""

DEPTH_GAP = 1.6
"""Least distance in depth, world units, between objects said to be in front of or behind each other."""

_COUNT_SHARES = (0.40, 0.45, 0.15)
_CHECK_RESOLUTION = 64
_CHECK_VISIBLE = 0.42  # stricter than MIN_VISIBLE, because the check is made on a coarse grid
_FRAME = 0.015
_SCREEN_GAP = 0.012
_ATTEMPTS = 60


def _pick(generator: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(generator.integers(len(options)))]


def _positions(
    generator: np.random.Generator, count: int, relation: str | None
) -> tuple[tuple[float, float], ...]:
    """Proposed (x, z) of every object; object 0 stands in `relation` to the rest."""

    def between(low: float, high: float) -> float:
        return float(generator.uniform(low, high))

    if relation is None:
        return ((between(-1.7, 1.7), between(-1.2, 1.8)),)
    if relation in ("left of", "right of"):
        sign = -1.0 if relation == "left of" else 1.0
        z = between(-0.9, 1.4)
        first = (sign * between(0.5, 2.4), z)
        if count == 2:
            return first, (-sign * between(0.5, 2.4), z + between(-0.8, 0.8))
        return first, *((-sign * between(-0.2, 2.5), between(-1.3, 2.6)) for _ in range(2))
    front, back = between(-1.9, -0.2), between(0.8, 3.2)
    own, rest = (front, back) if relation == "in front of" else (back, front)
    x = between(-1.2, 1.2)
    if count == 2:
        return (x, own), (x + between(-0.9, 0.9), rest)
    x = between(-0.6, 0.6)
    return (
        (x, own),
        (x - between(0.5, 1.6), rest + between(-0.2, 0.2)),
        (x + between(0.5, 1.6), rest + between(-0.2, 0.2)),
    )


def holds(relation: str, subject: SceneObject, reference: SceneObject) -> bool:
    """Whether `subject` clearly stands in `relation` to `reference` as the camera sees them.

    Left and right: their silhouettes do not overlap in screen columns. Front and behind: they are `DEPTH_GAP`
    apart in depth and more apart in depth than sideways.
    """
    if relation not in INVERSE_RELATION:
        raise InputError(f"unknown relation {relation!r}; known: {', '.join(INVERSE_RELATION)}.")
    if relation in ("right of", "behind"):
        subject, reference = reference, subject
    if relation in ("left of", "right of"):
        return silhouette_box(subject)[2] + _SCREEN_GAP <= silhouette_box(reference)[0]
    depth = reference.z - subject.z
    return depth >= DEPTH_GAP and depth > abs(reference.x - subject.x)


def _acceptable(scene: Scene) -> bool:
    solids = scene.objects
    for solid in solids:
        left, top, right, bottom = silhouette_box(solid)
        if min(left, top) < _FRAME or max(right, bottom) > 1.0 - _FRAME:
            return False
    for index, first in enumerate(solids):
        for second in solids[index + 1 :]:
            reach = first.footprint + second.footprint + 0.08
            if (first.x - second.x) ** 2 + (first.z - second.z) ** 2 < reach * reach:
                return False
    if scene.relation is not None and not all(
        holds(scene.relation, solids[0], other) for other in solids[1:]
    ):
        return False
    return min(cast(scene, _CHECK_RESOLUTION).visible_fraction) >= _CHECK_VISIBLE


def sample_scene(seed: int) -> Scene:
    """The scene of `seed`; the same seed always gives the same scene.

    About 40 % of scenes hold one object, 45 % two and 15 % three. No two objects of a scene share both shape
    and colour, all lie inside the image without touching, each shows at least `MIN_VISIBLE` of its
    silhouette, and `Scene.relation` holds between the first object and every other.

    Raises:
        InputError: `seed` is negative.
    """
    if seed < 0:
        raise InputError(f"a scene's seed is 0 or more, got {seed}.")
    generator = np.random.default_rng(seed)
    count = 1 + int(generator.choice(3, p=_COUNT_SHARES))
    relation = _pick(generator, RELATIONS) if count > 1 else None
    floor, time_of_day = _pick(generator, FLOORS), _pick(generator, TIMES)
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        kind = (_pick(generator, SHAPES), _pick(generator, COLORS))
        if kind not in kinds:
            kinds.append(kind)
    materials = [_pick(generator, MATERIALS) for _ in range(count)]
    while True:
        # sizes are drawn anew when no layout is found for them; a layout of small objects always is
        sizes = [_pick(generator, SIZES) for _ in range(count)]
        for _ in range(_ATTEMPTS):
            solids = tuple(
                SceneObject(shape, color, material, size, x, z, float(generator.uniform(0.0, np.pi / 2)))
                for (shape, color), material, size, (x, z) in zip(
                    kinds, materials, sizes, _positions(generator, count, relation), strict=True
                )
            )
            scene = Scene(solids, relation, floor, time_of_day)
            if _acceptable(scene):
                return scene
