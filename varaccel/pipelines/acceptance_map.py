"""An image of which pass decided which token: how an accelerator went about it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from varaccel.errors import InputError

# Eleven equally spaced colours of viridis (Smith and van der Walt 2015, CC0): lightness rises evenly with the pass, so
# the order is seen without colour vision and in print.
_RAMP = np.array(
    [
        *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
        *((34, 168, 132), (66, 190, 113), (122, 209, 81), (187, 223, 39), (253, 231, 37)),
    ],
    dtype=np.float64,
)
_EMPTY = (225, 225, 225)
_SEAM = (255, 255, 255)
_INK = (40, 40, 40)
_LEAST_CELL = 16
"""Tokens are drawn with seams between them from this many pixels on."""
_LEAST_LEGEND = 160
"""Narrower maps have no room for the words of a legend."""


def pass_colors(written: NDArray[Any], passes: int) -> NDArray[np.uint8]:
    """Colours [..., 3] of pass numbers: dark for the first, bright for the last, grey for 0 (not decided)."""
    place = (np.asarray(written, dtype=np.float64) - 1).clip(0) / max(1, passes - 1) * (len(_RAMP) - 1)
    below = np.floor(place).astype(int).clip(0, len(_RAMP) - 2)
    share = (place - below)[..., None]
    colors = _RAMP[below] * (1 - share) + _RAMP[below + 1] * share
    colors[np.asarray(written) == 0] = _EMPTY
    return colors.round().astype(np.uint8)


def acceptance_map(
    written: Any,
    passes: int,
    size: int = 512,
    *,
    image: Image.Image | None = None,
    opacity: float = 0.5,
    legend: bool = True,
) -> Image.Image:
    """Which pass decided each token, as colours from dark (pass 1) to bright (pass `passes`); empty tokens are grey.

    Args:
        written: [h, w] integers, the pass of each token counted from 1, 0 = empty; a tensor or an array.
        passes: passes of the whole call. Maps of one call share it, so that their colours mean the same.
        size: longer side of the map in pixels, without the legend; at least the longer side of the grid. The map
            is made of whole pixels per token and may be a little smaller.
        image: the image itself, to be seen in grey under the colours.
        opacity: of the colours over `image`, 0 to 1.
        legend: add a bar of the colours below the map; maps too narrow for its words go without.

    Raises:
        InputError: an argument out of its range.
    """
    passes_written = written.detach().cpu().numpy() if hasattr(written, "detach") else np.asarray(written)
    if passes_written.ndim != 2 or passes_written.size == 0 or passes_written.dtype.kind not in "iu":
        raise InputError(
            "an acceptance map is drawn of integers [h, w], the pass that decided each token, got "
            f"{passes_written.dtype} {list(passes_written.shape)}."
        )
    least, last = int(passes_written.min()), int(passes_written.max())
    if passes < 1 or least < 0 or last > passes:
        raise InputError(
            f"passes are counted from 1, or 0 for an empty token, to {passes}, got {least} to {last}."
        )
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity lies between 0 and 1, got {opacity}.")
    rows, columns = passes_written.shape
    cell = size // max(rows, columns)
    if cell < 1:
        raise InputError(
            f"a map of {rows} × {columns} tokens needs a size of {max(rows, columns)}, got {size}."
        )
    area = (columns * cell, rows * cell)
    tokens = Image.fromarray(pass_colors(passes_written, passes)).resize(area, Image.Resampling.NEAREST)
    if image is not None:
        # scenes at night would vanish under the colours
        grey = ImageOps.autocontrast(image.convert("L"), cutoff=1).convert("RGB")
        grey = grey.resize(area, Image.Resampling.LANCZOS)
        tokens = Image.blend(grey, tokens, opacity)
    elif cell >= _LEAST_CELL:
        draw = ImageDraw.Draw(tokens)
        for column in range(1, columns):
            draw.line((column * cell, 0, column * cell, area[1]), fill=_SEAM)
        for row in range(1, rows):
            draw.line((0, row * cell, area[0], row * cell), fill=_SEAM)
    if not legend or area[0] < _LEAST_LEGEND:
        return tokens
    return _with_legend(tokens, passes)


def _with_legend(tokens: Image.Image, passes: int) -> Image.Image:
    """The map above a bar of its colours with the first and the last pass in words."""
    width, height = tokens.size
    text = max(11, min(20, width // 28))
    font = ImageFont.load_default(text)
    margin = text // 2
    strip = text + 2 * margin
    sheet = Image.new("RGB", (width, height + strip), "white")
    sheet.paste(tokens, (0, 0))
    draw = ImageDraw.Draw(sheet)
    middle = height + strip // 2
    first, last = "pass 1", str(passes)
    draw.text((margin, middle), first, _INK, font, anchor="lm")
    left = margin + round(draw.textlength(first, font)) + margin
    right = width - margin
    if passes > 1:
        draw.text((right, middle), last, _INK, font, anchor="rm")
        right -= round(draw.textlength(last, font)) + margin
    length = max(1, right - left)
    # few passes show as steps, many as a gradient
    numbers = 1 + np.arange(length) * passes // length
    bar = Image.fromarray(pass_colors(numbers[None], passes)).resize((length, text), Image.Resampling.NEAREST)
    sheet.paste(bar, (left, middle - text // 2))
    return sheet
