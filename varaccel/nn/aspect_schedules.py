"""Scale schedules of Infinity: one template of 13 token maps for each of 15 aspect ratios, cut short for small images.

Source: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis" (arXiv
2412.04431), section 3.2, with the numbers of the published code.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from varaccel.errors import InputError, unknown_name
from varaccel.nn.scale_schedule import ScaleSchedule

Grids = tuple[tuple[int, int], ...]

PIXELS_PER_TOKEN = 16
"""Image pixels per token of the last scale along each side, in all published models."""

SIZES: Mapping[str, int] = MappingProxyType({"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13})
"""How many scales of a template an image of about so many million pixels has."""

_PORTRAIT: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("1.0", "1.0"): "1,1 2,2 4,4 6,6 8,8 12,12 16,16 20,20 24,24 32,32 40,40 48,48 64,64",
        ("1.25", "0.8"): "1,1 2,2 3,3 5,4 10,8 15,12 20,16 25,20 30,24 35,28 45,36 55,44 70,56",
        ("1.333", "0.75"): "1,1 2,2 4,3 8,6 12,9 16,12 20,15 24,18 28,21 36,27 48,36 60,45 72,54",
        ("1.5", "0.666"): "1,1 2,2 3,2 6,4 9,6 15,10 21,14 27,18 33,22 39,26 48,32 63,42 78,52",
        ("1.75", "0.571"): "1,1 2,2 3,3 7,4 11,6 14,8 21,12 28,16 35,20 42,24 56,32 70,40 84,48",
        ("2.0", "0.5"): "1,1 2,2 4,2 6,3 10,5 16,8 22,11 30,15 38,19 46,23 60,30 74,37 90,45",
        ("2.5", "0.4"): "1,1 2,2 5,2 10,4 15,6 20,8 25,10 30,12 40,16 50,20 65,26 80,32 100,40",
        ("3.0", "0.333"): "1,1 2,2 6,2 9,3 15,5 21,7 27,9 36,12 45,15 54,18 72,24 90,30 111,37",
    }
)
"""Height and width of every scale by the names of the upright ratio and of the one lying down, its transpose."""


def _templates() -> dict[str, Grids]:
    table: dict[str, Grids] = {}
    for (upright, lying), text in _PORTRAIT.items():
        pairs = [pair.split(",") for pair in text.split()]
        table[upright] = tuple((int(h), int(w)) for h, w in pairs)
        table[lying] = tuple((int(w), int(h)) for h, w in pairs)
    return table


TEMPLATES: Mapping[str, Grids] = MappingProxyType(_templates())
"""The 13 grids (height, width) of every ratio of height to width, in the published order."""


def infinity_schedule(ratio: str | float = "1.0", size: str = "1M") -> ScaleSchedule:
    """The published schedule of an aspect ratio and a size.

    Args:
        ratio: height / width, one of `TEMPLATES` as it is written there or as a number; see `nearest_ratio`.
        size: one of `SIZES`.

    Returns:
        the schedule in tokens of the transformer. Its `reference` is the last grid of the whole template, which rotary
        coordinates refer to at every size.

    Raises:
        InputError: another ratio or size.
    """
    name = _ratio_name(ratio)
    if size not in SIZES:
        raise unknown_name("size of an Infinity image", str(size), SIZES)
    return _cut(name, size)


@cache
def _cut(ratio: str, size: str) -> ScaleSchedule:
    """Made once: a call that looks a size up asks for all of them."""
    template = TEMPLATES[ratio]
    return ScaleSchedule(template[: SIZES[size]], reference=template[-1])


def infinity_pixels(ratio: str | float = "1.0", size: str = "1M") -> tuple[int, int]:
    """Height and width in pixels of the images of a published schedule.

    Raises:
        InputError: as `infinity_schedule`.
    """
    height, width = infinity_schedule(ratio, size).last_grid
    return height * PIXELS_PER_TOKEN, width * PIXELS_PER_TOKEN


def nearest_ratio(height: float, width: float) -> str:
    """The template for images of `height` x `width`, in any unit: that of the nearest height / width.

    By absolute difference, as the published code chooses; of two equally near ones the first in the order of
    `TEMPLATES`.

    Raises:
        InputError: a side that is not a positive finite number.
    """
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise InputError(
            f"the height and width of an image must be positive numbers, got {height} and {width}; "
            "give both in pixels, such as 1024 and 768."
        )
    wanted = height / width
    return min(TEMPLATES, key=lambda name: abs(float(name) - wanted))


def _ratio_name(ratio: str | float) -> str:
    name = str(ratio)
    if name not in TEMPLATES:
        with contextlib.suppress(ValueError, TypeError):
            number = float(ratio)
            name = next((known for known in TEMPLATES if float(known) == number), name)
    if name not in TEMPLATES:
        raise InputError(
            f"there is no Infinity schedule for height / width = {ratio}; choose one of {', '.join(TEMPLATES)}, "
            "or let nearest_ratio(height, width) choose."
        )
    return name
