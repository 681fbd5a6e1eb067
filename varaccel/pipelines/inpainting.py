"""What stays and what is painted anew: images and masks for zero-shot editing with next-scale models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from varaccel.errors import InputError
from varaccel.image_inputs import marked_pixels, rgb_image
from varaccel.nn.scale_schedule import ScaleSchedule

ALWAYS_KEPT = 3
"""Scales of at most so many tokens are kept whole: they say what the image is as a whole (published code)."""


def image_tensor(image: Any, size: int) -> Tensor:
    """An image as [1, 3, size, size] float32 in [-1, 1].

    Args:
        image: see `rgb_image`; of any size, scaled and cropped to a centred square.

    Raises:
        InputError: nothing that is an image.
    """
    fitted = ImageOps.fit(rgb_image(image), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


def mask_tensor(mask: Any, size: int, image_size: tuple[int, int] | None = None) -> Tensor:
    """A mask as [size, size] float32: 1 where the image is painted anew, 0 where it stays.

    It is cropped as the image is. A pixel is painted anew if anything in it is marked, so that no stroke is too thin.

    Args:
        mask: white where to paint, see `marked_pixels`; of any size.
        image_size: (width, height) of the image that the mask belongs to; the mask must have its aspect.

    Raises:
        InputError: nothing that is a mask, one that paints nothing, or one of another aspect than the image.
    """
    marked = marked_pixels(mask)
    height, width = marked.shape
    if image_size is not None and not _same_aspect((width, height), image_size):
        raise InputError(
            f"the mask is {width} × {height} pixels but the image {image_size[0]} × {image_size[1]}; pass a mask of "
            "the whole image, of its size or scaled evenly."
        )
    if not marked.any():
        raise InputError(
            "the mask is black everywhere, so nothing would be painted; paint the part to change white."
        )
    side = min(width, height)
    painted = _any_between(_any_between(marked, side, size).T, side, size).T
    if not painted.any():
        raise InputError(
            "the mask marks only what is cut off: a centred square is kept of an image, and nothing in it would be "
            "painted; mask a part of the square, or crop image and mask yourself."
        )
    return torch.from_numpy(painted).float()


def _same_aspect(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask (width, height) is the image scaled evenly, its sides rounded by up to a pixel."""
    return abs(mask[0] * image[1] - mask[1] * image[0]) <= max(image)


def _any_between(marked: NDArray[np.bool_], side: int, size: int) -> NDArray[np.bool_]:
    """The middle `side` of N rows, brought to `size`: [N, M] -> [size, M]; a row is the union of those it touches."""
    steps = np.arange(size + 1)
    # (N - side) / 2 + step * side / size, in whole numbers: rounding must not touch one more row
    doubled = (len(marked) - side) * size + 2 * steps * side
    first, last = doubled[:-1] // (2 * size), -(-doubled[1:] // (2 * size))
    # unions from each first to each last row, and between them others that are left out again; a row more, as an index
    # must be one of a row
    bounds = np.stack([first, last], -1).flatten()
    return np.logical_or.reduceat(np.pad(marked, ((0, 1), (0, 0))), bounds)[::2]


def kept_tokens(mask: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Which tokens stay, [L] bool.

    At the finest scale those stay in whose cell nothing is painted. At a coarser one, a token is judged by the
    finest cells next to the centre of its own, four or fewer: it stays if those that stay weigh more than half,
    bilinearly (published code). What is painted elsewhere in its cell does not count, so a thin stroke may change the
    fine scales only. Scales of at most `ALWAYS_KEPT` tokens stay whole.

    Args:
        mask: [size, size], 1 where the image is painted anew.
    """
    side = schedule.last_side
    keep = 1 - F.adaptive_max_pool2d(mask[None, None], side)
    parts = []
    for patches in schedule.sides:
        if patches * patches <= ALWAYS_KEPT:
            parts.append(torch.ones(patches * patches, dtype=torch.bool))
        else:
            scaled = F.interpolate(keep, (patches, patches), mode="bilinear")
            parts.append((scaled > 0.5).flatten())
    return torch.cat(parts)


def placed(image: Any, box: tuple[int, int, int, int], size: int) -> tuple[Image.Image, Tensor]:
    """An image in a box of a larger one, and the mask of what is around it, for out-painting.

    Args:
        image: see `rgb_image`; scaled to the box.
        box: left, top, right, bottom in pixels of the larger image.
        size: side of the larger image.

    Returns:
        the larger image, its border filled by the nearest pixels, and its mask [size, size].

    Raises:
        InputError: nothing that is an image; a box outside the larger image, or one that covers all of it.
    """
    if len(box) != 4 or not all(isinstance(edge, (int, np.integer)) for edge in box):
        raise InputError(f"the box must be four integers, (left, top, right, bottom), got {box}.")
    left, top, right, bottom = box
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise InputError(f"the box must lie within 0 to {size} as (left, top, right, bottom), got {box}.")
    if (left, top, right, bottom) == (0, 0, size, size):
        raise InputError("the box covers the whole image, so nothing is left to paint; make it smaller.")
    inner = np.array(rgb_image(image).resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    around = ((top, size - bottom), (left, size - right), (0, 0))
    mask = torch.ones(size, size)
    mask[top:bottom, left:right] = 0
    # the encoder looks across the border; the nearest colours mislead it least
    return Image.fromarray(np.pad(inner, around, mode="edge")), mask
