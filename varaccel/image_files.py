"""Image files: what can be written is checked first, and what is written is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from varaccel.errors import InputError
from varaccel.files import atomic_path
from varaccel.image_inputs import upright


def check_image_path(path: Path) -> None:
    """Refuse, before any work is done, a path that no image can be written to.

    Raises:
        InputError: it is a folder, or its suffix names no image format.
    """
    known = Image.registered_extensions()
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it, such as {path / 'image.png'}.")
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{path} must end with the name of an image format, such as .png, .jpg or .webp.")


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
    except (OSError, ValueError) as error:
        raise InputError(f"the image could not be written to {path}: {error}") from error
