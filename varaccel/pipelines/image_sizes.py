"""Sizes of images for models that draw more than one."""

from __future__ import annotations

import re

from varaccel.engine.options import as_integer
from varaccel.errors import InputError


def whole_tokens(height: int, width: int, step: int) -> tuple[int, int]:
    """The size of an image in pixels as integers (height, width).

    Args:
        step: pixels per token and axis.

    Raises:
        InputError: a side that is no multiple of `step`.
    """
    for name, side in (("height", height), ("width", width)):
        pixels = as_integer(side)
        if pixels is None or pixels < step or pixels % step:
            raise InputError(f"{name} must be a multiple of {step} pixels, got {side!r}.")
    return int(height), int(width)


def parse_ratio(ratio: str) -> tuple[int, int]:
    """Width and height of a ratio such as "16:9".

    Raises:
        InputError: no ratio.
    """
    parts = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", ratio) if isinstance(ratio, str) else None
    if parts is None:
        raise InputError(f"ratio is width to height in whole numbers, such as '16:9', got {ratio!r}.")
    return int(parts[1]), int(parts[2])


def ratio_size(ratio: str, pixels: int, step: int) -> tuple[int, int]:
    """(height, width) of about so many `pixels` in all, whose sides have a ratio and are multiples of `step`.

    Args:
        ratio: width to height, such as "16:9".

    Raises:
        InputError: no ratio, or one so narrow that no token fits in.
    """
    width, height = parse_ratio(ratio)
    scale = (pixels / (width * height)) ** 0.5 / step
    rows, columns = round(height * scale), round(width * scale)
    if min(rows, columns) < 1:
        raise InputError(f"an image of ratio {ratio!r} would be thinner than a token; take a wider one.")
    return rows * step, columns * step
