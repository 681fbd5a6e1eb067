"""Image files: what can be written is checked first, and what is written is written whole or not at all."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

from PIL import Image

from varaccel.errors import InputError
from varaccel.files import atomic_path, check_writable, is_folder
from varaccel.image_inputs import upright

_LONG = 100_000
"""More pixels than the side of an image may have in any format that limits it."""

_REFUSALS = (OSError, ValueError, struct.error)
"""What Pillow raises at images that it cannot write."""


def check_image_path(path: Path, size: tuple[int, int] = (16, 16)) -> None:
    """Refuse, before any work is done, a path that no image can be written to.

    Args:
        size: (width, height) of the image, as far as it is known; some formats have a largest one.

    Raises:
        InputError: it is a folder, its suffix names no format of such images, or nothing can be written there.
    """
    if is_folder(path):
        raise InputError(f"{path} is a folder; name a file in it, such as {path / 'image.png'}.")
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise InputError(f"{path} must end with the name of an image format, such as .png, .jpg or .webp.")
    try:
        # some formats hold no RGB or want another program; a line as long as a side finds out whether that is too long
        for width, height in ((size[0], 1), (1, size[1])):
            Image.new("RGB", (min(width, _LONG), min(height, _LONG))).save(BytesIO(), name)
    except _REFUSALS as error:
        raise InputError(
            f"{path} cannot hold an image of {size[0]} × {size[1]} pixels ({error}); name another format, such as .png."
        ) from error
    check_writable(path)


def read_image(path: Path) -> Image.Image:
    """The image in a file, upright and of the file's own mode; the first one of several.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            return upright(image.copy())
    except Exception as error:  # what Pillow raises at damaged files is not limited to OSError
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def write_image(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        with atomic_path(path) as temporary:
            image.save(temporary)
    except _REFUSALS as error:
        raise InputError(f"the image could not be written to {path}: {error}") from error
