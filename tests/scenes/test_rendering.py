"""The ray caster: geometry against brute force, shadows against traced rays, and what images must show."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from varaccel.errors import InputError
from varaccel.scenes import Scene, SceneObject, render, sample_scene
from varaccel.scenes.camera import DISTANCE, HEIGHT, project, ray_grid
from varaccel.scenes.lighting import LIGHTS
from varaccel.scenes.primitives import intersect, normal, shadow_distance
from varaccel.scenes.renderer import cast, silhouette_box
from varaccel.scenes.world import COLORS, FLOORS, MATERIALS, SHAPES, SIZES, TIMES

solids = st.builds(
    SceneObject,
    shape=st.sampled_from(SHAPES),
    color=st.just("red"),
    material=st.just("matte"),
    size=st.sampled_from(SIZES),
    x=st.floats(-1.5, 1.5),
    z=st.floats(-1.0, 2.0),
    rotation=st.floats(0.0, math.pi),
)


def alone(
    shape: str = "sphere",
    color: str = "red",
    material: str = "matte",
    floor: str = "gray",
    time: str = "noon",
    size: str = "large",
    rotation: float = 0.5,
) -> Scene:
    return Scene((SceneObject(shape, color, material, size, 0.0, 0.0, rotation),), None, floor, time)


def inside(solid: SceneObject, point: NDArray[np.float64]) -> NDArray[np.float64]:
    """How deep points [3, ...] lie in the solid by its definition: positive inside, negative outside."""
    x, y, z = point[0] - solid.x, point[1], point[2] - solid.z
    radius, height = solid.radius, solid.height
    around = np.hypot(x, z)
    if solid.shape == "sphere":
        return radius - np.sqrt(x**2 + (y - radius) ** 2 + z**2)
    walls = np.minimum(y, height - y)
    if solid.shape == "cylinder":
        return np.minimum(walls, radius - around)
    if solid.shape == "cone":
        return np.minimum(walls, radius * (1 - y / height) - around)
    cos, sin = math.cos(solid.rotation), math.sin(solid.rotation)
    sides = np.maximum(np.abs(cos * x - sin * z), np.abs(sin * x + cos * z))
    return np.minimum(walls, radius - sides)


@settings(max_examples=60, deadline=None)
@given(solid=solids, seed=st.integers(0, 2**31))
def test_intersection_is_the_first_point_of_the_solid_along_the_ray(solid: SceneObject, seed: int) -> None:
    generator = np.random.default_rng(seed)
    origin = generator.uniform((-4, 0.05, -5), (4, 4, 5), (64, 3))
    aim = np.array([solid.x, solid.height / 2, solid.z]) + generator.normal(0, 0.7, (64, 3))
    ray = aim - origin
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    outside = inside(solid, origin.T) < -0.02
    origin, ray = origin[outside], ray[outside]
    found = intersect(solid, tuple(origin.T.astype(np.float32)), tuple(ray.T.astype(np.float32)))

    steps = np.linspace(0.0, 14.0, 1401)
    depth = inside(solid, origin.T[:, :, None] + ray.T[:, :, None] * steps)
    met = (depth > 0.01).any(axis=1)
    missed = (depth < -0.01).all(axis=1)
    assert np.isfinite(found[met]).all()
    assert not np.isfinite(found[missed]).any()
    first = steps[np.argmax(depth[met] > 0.0, axis=1)]
    assert np.abs(found[met] - first).max(initial=0.0) < 0.02
    hit = np.isfinite(found)
    surface = origin.T[:, hit] + ray.T[:, hit] * found[hit]
    assert np.abs(inside(solid, surface)).max(initial=0.0) < 2e-3


@settings(max_examples=40, deadline=None)
@given(solid=solids, seed=st.integers(0, 2**31))
def test_normals_have_unit_length_and_point_out_of_the_solid(solid: SceneObject, seed: int) -> None:
    generator = np.random.default_rng(seed)
    origin = np.array([solid.x, solid.height / 2, solid.z]) + 5.0 * _directions(generator, 64)
    ray = np.array([solid.x, solid.height / 2, solid.z]) + generator.normal(0, 0.2, (64, 3)) - origin
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    found = intersect(solid, tuple(origin.T.astype(np.float32)), tuple(ray.T.astype(np.float32)))
    hit = np.isfinite(found)
    surface = origin.T[:, hit] + ray.T[:, hit] * found[hit]
    # the foot of a cone faces the floor and is never seen
    seen = surface[1] > 0.02
    surface = surface[:, seen]
    normals = np.stack(normal(solid, tuple(surface.astype(np.float32))))
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1.0, atol=1e-4)
    assert (inside(solid, surface + 0.01 * normals) < 0).all()


def _directions(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    values = generator.normal(size=(count, 3))
    values[:, 1] = np.abs(values[:, 1])
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("time", TIMES)
@settings(max_examples=30, deadline=None)
@given(solid=solids, seed=st.integers(0, 2**31))
def test_shadow_outline_agrees_with_rays_traced_to_the_light(
    time: str, solid: SceneObject, seed: int
) -> None:
    light = LIGHTS[time]
    points = np.random.default_rng(seed).uniform(-5, 5, (2, 400)) + np.array([[solid.x], [solid.z]])
    cos, sin = math.cos(light.heading), math.sin(light.heading)
    dx, dz = points[0] - solid.x, points[1] - solid.z
    distance = shadow_distance(
        solid,
        (dx * cos + dz * sin).astype(np.float32),
        (dz * cos - dx * sin).astype(np.float32),
        light.lean,
        light.heading,
    )
    origin = (points[0].astype(np.float32), np.full(400, 1e-3, np.float32), points[1].astype(np.float32))
    ray = tuple(np.full(400, part, np.float32) for part in light.direction)
    under = inside(solid, np.stack([points[0], np.full(400, 1e-3), points[1]])) > -0.03
    blocked = np.isfinite(intersect(solid, origin, ray))
    clear_cut = (np.abs(distance) > 0.03) & ~under
    np.testing.assert_array_equal(distance[clear_cut] < 0, blocked[clear_cut])


@settings(max_examples=40, deadline=None)
@given(solid=solids)
def test_bounding_box_on_screen_contains_the_silhouette(solid: SceneObject) -> None:
    grid = ray_grid(96)
    everywhere = intersect(
        solid, (0.0, HEIGHT, -DISTANCE), (grid.direction_x, grid.direction_y, grid.direction_z)
    )
    rows, columns = np.nonzero(np.isfinite(everywhere))
    left, top, right, bottom = silhouette_box(solid)
    assert left <= (columns.min() + 0.5) / 96
    assert (columns.max() + 0.5) / 96 <= right
    assert top <= (rows.min() + 0.5) / 96
    assert (rows.max() + 0.5) / 96 <= bottom
    seen = cast(Scene((solid,), None, "gray", "noon"), 96)
    np.testing.assert_array_equal(seen.ids == 0, np.isfinite(everywhere))
    assert seen.visible_fraction == (1.0,)


def test_projection_is_the_inverse_of_the_ray_grid() -> None:
    grid = ray_grid(40)
    ground = slice(grid.horizon, None)
    columns, rows = project(grid.floor_x[ground], np.zeros_like(grid.floor_x[ground]), grid.floor_z[ground])
    centres = (np.arange(40) + 0.5) / 40
    np.testing.assert_allclose(columns, np.broadcast_to(centres, columns.shape), atol=1e-3)
    np.testing.assert_allclose(rows, np.broadcast_to(centres[ground, None], rows.shape), atol=1e-3)


def test_rendering_has_the_documented_form_and_repeats_exactly() -> None:
    scene = sample_scene(11)
    first, second = render(scene, 64), render(scene, 64)
    assert first.image.shape == (64, 64, 3)
    assert first.image.dtype == np.uint8
    assert first.object_ids.shape == (64, 64)
    assert first.object_ids.dtype == np.int8
    assert set(np.unique(first.object_ids)) == {-1, *range(len(scene.objects))}
    np.testing.assert_array_equal(first.image, second.image)
    for index, (left, top, right, bottom) in enumerate(first.boxes):
        rows, columns = np.nonzero(first.object_ids == index)
        assert (left, right) == (columns.min() / 64, (columns.max() + 1) / 64)
        assert (top, bottom) == (rows.min() / 64, (rows.max() + 1) / 64)


def test_a_nearer_object_hides_a_farther_one_and_the_visible_share_says_how_much() -> None:
    near = SceneObject("cube", "red", "matte", "large", 0.0, -1.0)
    far = SceneObject("sphere", "blue", "matte", "large", 0.6, 2.0)
    for order in ((near, far), (far, near)):
        rendering = render(Scene(order, "in front of" if order[0] is near else "behind", "gray", "noon"))
        which = order.index(far)
        alone_area = (render(Scene((far,), None, "gray", "noon")).object_ids == 0).sum()
        seen_area = (rendering.object_ids == which).sum()
        assert 0.1 < rendering.visible_fraction[which] < 0.9
        assert rendering.visible_fraction[which] == pytest.approx(seen_area / alone_area, abs=0.03)
        assert rendering.visible_fraction[1 - which] == 1.0


def test_a_hidden_object_has_no_box() -> None:
    wall = SceneObject("cube", "red", "matte", "large", 0.0, -1.0)
    hidden = SceneObject("cone", "blue", "matte", "small", 0.0, 1.0)
    rendering = render(Scene((wall, hidden), "in front of", "gray", "noon"))
    assert rendering.visible_fraction[1] == 0.0
    assert rendering.boxes[1] == (0.0, 0.0, 0.0, 0.0)


def test_large_objects_fill_the_promised_part_of_the_image() -> None:
    for shape in SHAPES:
        large = render(alone(shape)).boxes[0]
        small = render(alone(shape, size="small")).boxes[0]
        assert large[3] - large[1] > 1 / 3
        assert 0.5 < (small[2] - small[0]) / (large[2] - large[0]) < 0.7


def _empty(floor: str, time: str, size: int) -> NDArray[np.uint8]:
    """The world with its only object behind the camera."""
    unseen = SceneObject("sphere", "red", "matte", "small", 0.0, -DISTANCE - 5.0)
    return render(Scene((unseen,), None, floor, time), size).image


@pytest.mark.parametrize("material", ["glossy", "metal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("time", TIMES)
def test_mirrors_do_not_look_like_glass(material: str, shape: str, time: str) -> None:
    """A checkered floor must not go on over the object as if one saw through it."""
    for rotation in (0.0, 0.4, 0.8):
        rendering = render(alone(shape, "gray", material, "checker", time, rotation=rotation))
        inner = rendering.object_ids == 0
        for axis, shift in itertools.product((0, 1), (-2, 2)):
            inner = inner & np.roll(rendering.object_ids == 0, shift, axis)
        steps = inner[:, 1:] & inner[:, :-1]
        seen = np.diff(rendering.image.astype(np.float64).mean(axis=2), axis=1)[steps]
        behind = np.diff(_empty("checker", time, 128).astype(np.float64).mean(axis=2), axis=1)[steps]
        # share of the floor's steps from tile to tile that shows on the object: 1 for clear glass
        share = float(seen @ behind) / float(behind @ behind)
        assert abs(share) < 0.1


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* (D65) of mean sRGB values 0 to 255, [..., 3]."""
    value = rgb / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) / np.array([[0.9505], [1.0], [1.089]])
    xyz = linear @ matrix.T
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [
            116 * root[..., 1] - 16,
            500 * (root[..., 0] - root[..., 1]),
            200 * (root[..., 1] - root[..., 2]),
        ],
        axis=-1,
    )


@pytest.mark.parametrize("time", TIMES)
def test_colors_can_be_told_apart_in_every_material(time: str) -> None:
    means: dict[tuple[str, str], NDArray[np.float64]] = {}
    for color, material in itertools.product(COLORS, MATERIALS):
        parts = []
        for shape, floor in (("sphere", "gray"), ("cube", "blue"), ("cone", "white")):
            rendering = render(alone(shape, color, material, floor, time), 48)
            parts.append(rendering.image[rendering.object_ids == 0].mean(axis=0))
        means[color, material] = _lab(np.mean(parts, axis=0))
    distances = {
        (first, second): float(np.linalg.norm(means[first] - means[second]))
        for first, second in itertools.combinations(means, 2)
        if first[0] != second[0]
    }
    nearest = min(distances, key=lambda pair: distances[pair])
    # a difference of 2.3 is just noticeable
    assert distances[nearest] > 10.0, (nearest, distances[nearest])


@pytest.mark.parametrize(
    ("color", "floor"),
    [("white", "white"), ("gray", "gray"), ("blue", "blue"), ("green", "green"), ("black", "checker")],
)
@pytest.mark.parametrize("time", TIMES)
def test_objects_stand_out_from_a_floor_of_their_own_color(color: str, floor: str, time: str) -> None:
    for shape, material in itertools.product(SHAPES, MATERIALS):
        with_object = render(alone(shape, color, material, floor, time), 64)
        without = _empty(floor, time, 64)
        change = np.abs(with_object.image.astype(int) - without.astype(int)).max(axis=2)
        assert change[with_object.object_ids == 0].mean() > 12.0


def test_times_of_day_and_floors_give_different_images() -> None:
    images = [render(alone(floor=floor, time=time), 32).image for floor in FLOORS for time in TIMES]
    for first, second in itertools.combinations(images, 2):
        assert np.abs(first.astype(int) - second.astype(int)).mean() > 4.0
    sunset, night = (render(alone(time=time), 32).image[:8].mean(axis=(0, 1)) for time in ("sunset", "night"))
    assert sunset[0] > sunset[2] + 50
    assert night[2] > night[0]
    assert night.mean() < 0.6 * sunset.mean()


def test_the_sun_throws_the_longest_shadow_at_sunset() -> None:
    def darkened(time: str) -> int:
        with_object = render(alone("cylinder", "white", "matte", "white", time))
        floor = with_object.object_ids == -1
        loss = _empty("white", time, 128).astype(int).sum(axis=2) - with_object.image.astype(int).sum(axis=2)
        return int((loss[floor] > 60).sum())

    assert darkened("sunset") > 1.3 * darkened("noon")
    assert darkened("noon") > 100


def test_supersampling_only_smooths_a_image_of_twice_the_size() -> None:
    scene = sample_scene(3)
    small = render(scene, 64).image.astype(float)
    large = render(scene, 128).image.astype(float)
    halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - halved).mean() < 2.0


def test_too_small_a_image_is_refused() -> None:
    with pytest.raises(InputError, match="at least 16 pixels"):
        render(sample_scene(0), 8)
