"""What a scene of the captioned world consists of: objects on a floor, at one of three times of day.

`x` grows to the right, `y` upwards and `z` away from the camera; the floor is the plane `y = 0`, and the
camera is fixed, so that a small model can learn the world.
"""

from __future__ import annotations

from dataclasses import dataclass

from varaccel.errors import InputError, unknown_name

WORLD_VERSION = "scenes-1"
"""Changes whenever the image or caption made from a seed changes."""

HELD_OUT_SEED = 1_000_000_000
"""Seeds from here on are reserved for evaluation; no training image may use them."""

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLORS = (
    "red",
    "green",
    "blue",
    "yellow",
    "orange",
    "purple",
    "pink",
    "cyan",
    "brown",
    "white",
    "gray",
    "black",
)
MATERIALS = ("matte", "glossy", "metal")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "in front of", "behind")
FLOORS = ("white", "gray", "blue", "green", "checker", "wood")
TIMES = ("noon", "sunset", "night")

INVERSE_RELATION = {
    "left of": "right of",
    "right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
}

MAX_OBJECTS = 3
_SCALE = {"small": 0.62, "large": 1.0}
_RADIUS = {"sphere": 1.0, "cube": 0.82, "cylinder": 0.8, "cone": 1.0}
_HEIGHT = {"sphere": 2.0, "cube": 1.64, "cylinder": 1.9, "cone": 2.1}


def _require(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise unknown_name(kind, name, known)


@dataclass(frozen=True)
class SceneObject:
    """One solid standing on the floor at (`x`, `z`); `rotation` is the turn about the vertical in radians."""

    shape: str
    color: str
    material: str
    size: str
    x: float
    z: float
    rotation: float = 0.0

    def __post_init__(self) -> None:
        _require("shape", self.shape, SHAPES)
        _require("color", self.color, COLORS)
        _require("material", self.material, MATERIALS)
        _require("size", self.size, SIZES)

    @property
    def radius(self) -> float:
        """Radius of a sphere, cylinder or cone base; half the edge of a cube. World units."""
        return _RADIUS[self.shape] * _SCALE[self.size]

    @property
    def height(self) -> float:
        """Height above the floor, world units."""
        return _HEIGHT[self.shape] * _SCALE[self.size]

    @property
    def footprint(self) -> float:
        """Radius of the disc on the floor that contains the object seen from above."""
        return self.radius * (2.0**0.5 if self.shape == "cube" else 1.0)


@dataclass(frozen=True)
class Scene:
    """One to three objects. `relation` holds between object 0 and every other; None for a single object."""

    objects: tuple[SceneObject, ...]
    relation: str | None
    floor: str
    time_of_day: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise InputError(f"a scene holds 1 to {MAX_OBJECTS} objects, got {len(self.objects)}.")
        if (self.relation is None) != (len(self.objects) == 1):
            raise InputError(
                "a scene of one object has relation None and a scene of several names their relation."
            )
        if self.relation is not None:
            _require("relation", self.relation, RELATIONS)
        _require("floor", self.floor, FLOORS)
        _require("time of day", self.time_of_day, TIMES)
