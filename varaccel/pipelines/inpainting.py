"""What stays and what is painted anew: images and masks for zero-shot editing with next-scale models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from varaccel.errors import InputError
from varaccel.nn.scale_schedule import ScaleSchedule

ALWAYS_KEPT = 3
"""Scales of at most so many tokens are kept whole: they say what the image is as a whole (published code)."""


def image_tensor(image: Any, size: int) -> Tensor:
    """An image as [1, 3, size, size] float32 in [-1, 1].

    Args:
        image: a PIL image of any size, which is scaled and cropped to a centred square; or an array or tensor in
            [0, 1] of shape [H, W, 3] or [3, H, W] with H = W = size.

    Raises:
        InputError: anything else.
    """
    if isinstance(image, Image.Image):
        from PIL import ImageOps

        fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1
    x = _numbers(image)
    given = list(x.shape)
    x = x.squeeze(0) if x.dim() == 4 else x
    if x.dim() == 3 and x.shape[-1] == 3:
        x = x.permute(2, 0, 1)
    if x.shape != (3, size, size):
        raise InputError(
            f"the image must be a PIL image, or numbers in [0, 1] of shape [3, {size}, {size}], "
            f"got {given or type(image).__name__}."
        )
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise InputError("the image's numbers must be from 0 to 1; divide 8-bit values by 255.")
    return x[None] * 2 - 1


def mask_tensor(mask: Any, size: int) -> Tensor:
    """A mask as [size, size] float32: 1 where the image is painted anew (white), 0 where it stays (black).

    Args:
        mask: a PIL image, or an array or tensor [H, W] of numbers in [0, 1] or of bool; scaled to `size`.

    Raises:
        InputError: another shape, or a mask that paints nothing.
    """
    if isinstance(mask, Image.Image):
        from PIL import ImageOps

        fitted = ImageOps.fit(mask.convert("L"), (size, size), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(fitted)).float() / 255
    else:
        x = _numbers(mask)
        given = list(x.shape)
        x = x.squeeze()
        if x.dim() != 2:
            raise InputError(
                f"a mask must be a PIL image or numbers of shape [H, W], got {given or type(mask).__name__}."
            )
        if x.shape != (size, size):
            x = F.interpolate(x[None, None], (size, size), mode="bilinear")[0, 0]
    painted = (x > 0.5).float()
    if not painted.any():
        raise InputError(
            "the mask is black everywhere, so nothing would be painted; paint the part to change white."
        )
    return painted


def _numbers(values: Any) -> Tensor:
    """An array, tensor or nested list as float32; of shape [] if it is nothing of the kind."""
    try:
        return torch.as_tensor(values).float()
    except (TypeError, ValueError, RuntimeError):
        return torch.zeros(())


def kept_tokens(mask: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Which tokens stay, [L] bool: those whose cell is mostly outside the mask.

    The mask is brought to the finest scale, where a site stays only if nothing in it is painted, then resized
    bilinearly to every scale and cut at one half (published code).

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
        image: a PIL image; scaled to the box.
        box: left, top, right, bottom in pixels of the larger image.
        size: side of the larger image.

    Returns:
        the larger image, its border filled by the nearest pixels, and its mask [size, size].

    Raises:
        InputError: a box outside the image, or one that covers all of it.
    """
    if len(box) != 4 or not all(isinstance(edge, (int, np.integer)) for edge in box):
        raise InputError(f"the box must be four integers, (left, top, right, bottom), got {box}.")
    left, top, right, bottom = box
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise InputError(f"the box must lie within 0 to {size} as (left, top, right, bottom), got {box}.")
    if (left, top, right, bottom) == (0, 0, size, size):
        raise InputError("the box covers the whole image, so nothing is left to paint; make it smaller.")
    if not isinstance(image, Image.Image):
        raise InputError(f"out-painting takes a PIL image, got {type(image).__name__}.")
    inner = np.array(image.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    around = ((top, size - bottom), (left, size - right), (0, 0))
    mask = torch.ones(size, size)
    mask[top:bottom, left:right] = 0
    # the encoder looks across the border; the nearest colours mislead it least
    return Image.fromarray(np.pad(inner, around, mode="edge")), mask
