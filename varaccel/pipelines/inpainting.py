"""What stays and what is painted anew: images and masks for zero-shot editing, as pixels and as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

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


Size = tuple[int, int]
"""Height and width of what a model draws, in pixels."""


class Source(Protocol):
    """An image that is painted into. It is fitted in the course of the call, which decides the size."""

    def fitted(self, size: Size) -> tuple[Tensor, Tensor]:
        """Pixels [1, 3, H, W] float32 in [-1, 1], and a mask [H, W]: 1 where they are painted anew.

        Raises:
            InputError: nothing of this size would be painted.
        """
        ...


@dataclass(frozen=True, eq=False)
class MaskedImage:
    """An image and [H, W] bool of any even scale of it: what is painted anew."""

    image: Image.Image
    marked: NDArray[np.bool_]

    @classmethod
    def of(cls, image: Any, mask: Any) -> MaskedImage:
        """From an image, see `rgb_image`, and a mask, see `marked_pixels`.

        Raises:
            InputError: nothing that is an image; a mask that is none, paints nothing, or has another aspect.
        """
        given = rgb_image(image)
        return cls(given, checked_mask(mask, given.size))

    def fitted(self, size: Size) -> tuple[Tensor, Tensor]:
        return image_tensor(self.image, size), mask_tensor(self.marked, size)


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """An image and where it stands in a larger one, for out-painting; see `placed`."""

    image: Image.Image
    box: tuple[int, int, int, int]

    @classmethod
    def of(cls, image: Any, box: tuple[int, int, int, int]) -> PlacedImage:
        """From an image, see `rgb_image`.

        Raises:
            InputError: nothing that is an image.
        """
        return cls(rgb_image(image), box)

    def fitted(self, size: Size) -> tuple[Tensor, Tensor]:
        larger, mask = placed(self.image, self.box, size)
        return image_tensor(larger, size), mask


def image_tensor(image: Any, size: Size) -> Tensor:
    """An image as [1, 3, H, W] float32 in [-1, 1].

    Args:
        image: see `rgb_image`; of any size, scaled, and cropped around its centre to the aspect of `size`.

    Raises:
        InputError: nothing that is an image.
    """
    height, width = size
    fitted = ImageOps.fit(rgb_image(image), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


def checked_mask(mask: Any, image_size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """A mask as [H, W] bool of its own size.

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
    return marked


def mask_tensor(mask: Any, size: Size) -> Tensor:
    """A mask as [H, W] float32: 1 where the image is painted anew, 0 where it stays.

    It is cropped as the image is. A pixel is painted anew if anything in it is marked, so that no stroke is too thin.

    Args:
        mask: white where to paint, see `marked_pixels`; of any size.

    Raises:
        InputError: nothing that is a mask, one that paints nothing, or nothing within what is kept.
    """
    marked = checked_mask(mask)
    height, width = size
    # the largest part of this aspect; its sides may lie within pixels
    rows = min(Fraction(marked.shape[0]), Fraction(marked.shape[1] * height, width))
    columns = rows * width / height
    painted = _any_between(_any_between(marked, rows, height).T, columns, width).T
    if not painted.any():
        kept = "square" if height == width else f"part of aspect {width} : {height}"
        raise InputError(
            f"the mask marks only what is cut off: a centred {kept} is kept of an image, and nothing in it would be "
            "painted; mask a part of it, or crop image and mask yourself."
        )
    return torch.from_numpy(painted).float()


def _same_aspect(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask (width, height) is the image scaled evenly, its sides rounded by up to a pixel."""
    return abs(mask[0] * image[1] - mask[1] * image[0]) <= max(image)


def _any_between(marked: NDArray[np.bool_], side: Fraction, size: int) -> NDArray[np.bool_]:
    """The middle `side` of N rows, brought to `size`: [N, M] -> [size, M]; a row is the union of those it touches."""
    steps, kept, whole = np.arange(size + 1), side.numerator, side.denominator
    # (N - side) / 2 + step * side / size, in whole numbers: rounding must not touch one more row
    doubled = (len(marked) * whole - kept) * size + 2 * steps * kept
    unit = 2 * whole * size
    first, last = doubled[:-1] // unit, -(-doubled[1:] // unit)
    # unions from each first to each last row, and between them others that are left out again; a row more, as an index
    # must be one of a row
    bounds = np.stack([first, last], -1).flatten()
    return np.logical_or.reduceat(np.pad(marked, ((0, 1), (0, 0))), bounds)[::2]


def kept_cells(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Which cells of a grid stay, [rows, columns] bool: those in which nothing is painted.

    Args:
        mask: [H, W], 1 where the image is painted anew.
    """
    return F.adaptive_max_pool2d(mask[None, None], (rows, columns))[0, 0] == 0


def kept_tokens(mask: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Which tokens of all scales stay, [L] bool.

    At the finest scale those stay in whose cell nothing is painted. At a coarser one, a token is judged by the
    finest cells next to the centre of its own, four or fewer: it stays if those that stay weigh more than half,
    bilinearly (published code). What is painted elsewhere in its cell does not count, so a thin stroke may change the
    fine scales only. Scales of at most `ALWAYS_KEPT` tokens stay whole.

    Args:
        mask: [H, W], 1 where the image is painted anew.
    """
    keep = kept_cells(mask, *schedule.last_grid)[None, None].float()
    parts = []
    for rows, columns in schedule.grids:
        if rows * columns <= ALWAYS_KEPT:
            parts.append(torch.ones(rows * columns, dtype=torch.bool))
        else:
            scaled = F.interpolate(keep, (rows, columns), mode="bilinear")
            parts.append((scaled > 0.5).flatten())
    return torch.cat(parts)


def placed(image: Any, box: tuple[int, int, int, int], size: Size) -> tuple[Image.Image, Tensor]:
    """An image in a box of a larger one, and the mask of what is around it, for out-painting.

    Args:
        image: see `rgb_image`; scaled to the box.
        box: left, top, right, bottom in pixels of the larger image.
        size: of the larger image.

    Returns:
        the larger image, its border filled by the nearest pixels, and its mask [H, W].

    Raises:
        InputError: nothing that is an image; a box outside the larger image, or one that covers all of it.
    """
    whole = isinstance(box, Sequence) and all(isinstance(edge, (int, np.integer)) for edge in box)
    if not whole or len(box) != 4:
        raise InputError(f"the box must be four integers, (left, top, right, bottom), got {box}.")
    left, top, right, bottom = box
    height, width = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"the box must lie within 0 to {width} across and 0 to {height} down, as (left, top, right, bottom); "
            f"got {box}."
        )
    if (left, top, right, bottom) == (0, 0, width, height):
        raise InputError("the box covers the whole image, so nothing is left to paint; make it smaller.")
    inner = np.array(rgb_image(image).resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    around = ((top, height - bottom), (left, width - right), (0, 0))
    mask = torch.ones(height, width)
    mask[top:bottom, left:right] = 0
    # the encoder looks across the border; the nearest colours mislead it least
    return Image.fromarray(np.pad(inner, around, mode="edge")), mask
