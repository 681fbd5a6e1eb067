"""From the image tokenizer's output to images."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "raw", "latent")


Rounding = Literal["nearest", "down"]


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """[-1, 1] float [B, 3, H, W] -> uint8 [B, H, W, 3]; measured figures depend on the rounding.

    Args:
        rounding: "nearest" as LlamaGen's and MAR's published samplers do it (127.5 y + 128, clamped and truncated), or
            "down" as VAR's and CoDe's do (truncated from 255 (y + 1) / 2).
    """
    pixels = (images.float() * 127.5 + (128 if rounding == "nearest" else 127.5)).clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8)


def to_output(images: Tensor, output_type: str) -> Any:
    """[-1, 1] float [B, 3, H, W] to "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W] in [0, 1]) or "raw": float
    [B, 3, H, W] as the image tokenizer gives it, a little beyond [-1, 1] here and there."""
    if output_type == "raw":
        return images.float()
    if output_type == "pil":
        return [Image.fromarray(np.asarray(image)) for image in to_uint8(images).cpu()]
    unit = (images.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return unit
    return unit.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: list[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """One sheet of equally large images."""
    columns = columns or _columns(len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", grid_size(len(images), (width, height), columns, gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def grid_size(count: int, size: tuple[int, int], columns: int | None = None, gap: int = 2) -> tuple[int, int]:
    """(width, height) of the sheet that `grid` makes of `count` images of (width, height)."""
    columns = columns or _columns(count)
    return columns * (size[0] + gap) - gap, -(-count // columns) * (size[1] + gap) - gap


def _columns(count: int) -> int:
    return max(1, round(count**0.5 + 0.49))
