"""Sheets of images that commands write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from varaccel.errors import InputError
from varaccel.image_files import check_image_path, write_image
from varaccel.pipelines.pixels import grid, grid_size


def check_sheet(path: Path, count: int, pipe: Any) -> None:
    """Refuse, before they are drawn, a path that `write_sheet` cannot write `count` images of a pipeline to.

    Raises:
        InputError: see `check_image_path`.
    """
    try:
        side = pipe.image_size
    except (AttributeError, InputError):  # of no single size, or no squares
        return
    if count > 0:
        check_image_path(path, grid_size(count, (side, side)))


def write_sheet(images: list[Image.Image], path: Path) -> None:
    """Write one image as it is, several on one sheet."""
    write_image(images[0] if len(images) == 1 else grid(images), path)


def comparison_sheet(prompts: list[str], rows: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """A labelled row per accelerator, a column per prompt."""
    size = rows[0][0].width
    scale = max(1, 256 // size)
    tile, margin, line = size * scale, 8, 18
    width = margin + len(prompts) * (tile + margin)
    font = ImageFont.load_default(14)
    titles = [wrapped(prompt, font, tile)[:2] for prompt in prompts]
    told = [wrapped(label, font, width - 2 * margin) for label in labels]
    head, text = (line * max(map(len, lines)) + margin for lines in (titles, told))
    sheet = Image.new("RGB", (width, head + len(rows) * (tile + text + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(titles):
        draw.multiline_text((margin + column * (tile + margin), 6), "\n".join(lines), "black", font)
    for row, (images, lines) in enumerate(zip(rows, told, strict=True)):
        top = head + row * (tile + text + margin)
        for column, image in enumerate(images):
            place = (margin + column * (tile + margin), top)
            sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), place)
        draw.multiline_text((margin, top + tile + margin // 2), "\n".join(lines), "black", font)
    return sheet


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """Text in lines of at most `width` pixels; words are not parted."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
