"""Sheets of images that commands write."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from varaccel.image_files import check_image_path, write_image
from varaccel.pipelines.pixels import grid, grid_size


def check_sheet(path: Path, count: int, pipe: Any) -> None:
    """Refuse, before they are drawn, a path that `write_sheet` cannot write `count` images of a pipeline to.

    Raises:
        InputError: see `check_image_path`.
    """
    side = getattr(pipe, "image_size", None)
    if side is not None and count > 0:
        check_image_path(path, grid_size(count, (side, side)))


def write_sheet(images: list[Image.Image], path: Path) -> None:
    """Write one image as it is, several on one sheet."""
    write_image(images[0] if len(images) == 1 else grid(images), path)


def comparison_sheet(prompts: list[str], rows: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """A labelled row per accelerator, a column per prompt."""
    size = rows[0][0].width
    scale = max(1, 256 // size)
    tile, margin, text = size * scale, 8, 44
    width = margin + len(prompts) * (tile + margin)
    sheet = Image.new("RGB", (width, text + len(rows) * (tile + text)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, prompt in enumerate(prompts):
        wrapped = "\n".join(textwrap.wrap(prompt, 34)[:2])
        draw.multiline_text((margin + column * (tile + margin), 6), wrapped, "black", font)
    for row, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = text + row * (tile + text)
        for column, image in enumerate(images):
            place = (margin + column * (tile + margin), top)
            sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), place)
        draw.text((margin, top + tile + 8), label, "black", font)
    return sheet
