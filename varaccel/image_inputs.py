"""Images and masks that come in: whatever a user has becomes an upright image of 8-bit RGB, or a map of marked pixels.

In-painting, evaluation and the app read all images and masks through `rgb_image` and `marked_pixels`. Both take PIL
images of any mode, arrays and tensors, [H, W], [H, W, C] or [C, H, W], alone or in a batch of one. Numbers count so:

| numbers | black | white |
|---|---|---|
| bool | False | True |
| floats from 0 to 1 | 0 | 1 |
| whole numbers of any type up to 255 (mode "I;16" of images excepted) | 0 | 255 |
| larger whole numbers, 16 bits (modes "I;16" and "I", TIFF, PNG) | 0 | 65535; 32767 if they are int16 |
| whole numbers of a mask, none above 1: labels | 0 | 1 |

Anything else is refused. Of an animation or a file of several pages the first counts.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from varaccel.errors import InputError

Kind = Literal["image", "mask"]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright."""

_ORIENTATION = 0x0112
_HALF = 128
_TOLERANCE = 1e-3
"""How far a float may lie outside of 0 to 1 by arithmetic; it is clipped."""


def rgb_image(image: Any) -> Image.Image:
    """An image as every viewer shows it: upright, 8 bits of RGB, on white where it is transparent.

    Args:
        image: see the table above. An image of 8-bit RGB that lies upright comes back as it is.

    Raises:
        InputError: anything else, or an image without pixels.
    """
    plain = _plain(image, "image")
    if plain.mode in ("LA", "RGBA"):
        layer = plain.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return plain if plain.mode == "RGB" else plain.convert("RGB")


def marked_pixels(mask: Any) -> NDArray[np.bool_]:
    """What a mask marks, [H, W]: its bright pixels, or where there are strokes on a transparent layer.

    Without transparency, pixels of at least half brightness are marked. With some:

    - Pixels that are less than half as opaque as the most opaque one are never marked.
    - If the others are black and white, the white ones are marked.
    - If they are all bright or all dark, they are strokes, whatever their colour: all of them are marked. Strokes
      leave most of the mask, and of its edge, transparent; otherwise it may be an image with a hole for what to change,
      which means the opposite, so it is refused.

    Args:
        mask: see the table above. Labels of a palette image count where its colours say nothing.

    Raises:
        InputError: anything else; transparency that can be understood in two ways.
    """
    plain = _plain(mask, "mask")
    bright = _grey(plain)
    if plain.mode not in ("LA", "RGBA"):
        if not bright.any() and isinstance(mask, Image.Image) and mask.mode == "P":
            # colour maps of labels are dark at the low numbers
            labels = np.asarray(upright(mask))
            return labels == 1 if labels.max() == 1 else bright
        return bright
    return _of_layer(bright, plain)


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF data say; the same image if they say nothing or cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    # not ImageOps.exif_transpose, which writes the other tags anew and fails at damaged ones
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in turned.info.items() if key in ("transparency", "icc_profile")}
    return turned


# -- transparency of masks -----------------------------------------------------------------------------


def _grey(plain: Image.Image) -> NDArray[np.bool_]:
    """Where an image of 8 bits is bright."""
    grey = np.asarray(plain.convert("L"))
    return _bytes(grey, "mask") >= _HALF


def _of_layer(bright: NDArray[np.bool_], plain: Image.Image) -> NDArray[np.bool_]:
    """The marked pixels of a mask with an alpha channel, see `marked_pixels`."""
    alpha = np.asarray(plain.getchannel("A"))
    if not alpha.any():
        raise InputError(
            "the mask is transparent everywhere; save it without transparency, white where to paint."
        )
    visible = 2 * alpha.astype(np.int16) >= alpha.max()  # brushes may be half transparent throughout
    if visible.all():
        return bright
    shown = bright[visible]
    if shown.all() or not shown.any():
        edge = np.concatenate([visible[0], visible[-1], visible[:, 0], visible[:, -1]])
        if 2 * visible.sum() > visible.size or 2 * edge.sum() > edge.size:
            raise InputError(
                f"the mask has an alpha channel that is opaque on {visible.mean():.0%} of it, so it could mean strokes "
                "or a hole; save it without transparency, white where to paint and black elsewhere."
            )
        return visible
    tones = np.asarray(plain.convert("RGB")).astype(np.int16)[visible]
    between = (tones.max(-1) > 32) & (tones.min(-1) < 223)
    if between.mean() > 0.1:
        raise InputError(
            "the mask has an alpha channel and colours beside, so what it marks is not clear; save it without "
            "transparency, white where to paint and black elsewhere."
        )
    return bright & visible


# -- modes and numbers ---------------------------------------------------------------------------------


def _plain(given: Any, kind: Kind) -> Image.Image:
    """An image or mask of any kind as an upright PIL image of mode L, LA, RGB or RGBA."""
    if not isinstance(given, Image.Image):
        return _of_array(given, kind)
    if 0 in given.size:
        raise InputError(f"the {kind} is empty: {given.width} × {given.height} pixels.")
    try:
        given.load()  # some formats know their orientation only then
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the {kind} cannot be read: {error}") from error
    return _plain_mode(upright(given), kind)


def _plain_mode(image: Image.Image, kind: Kind) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_bytes(np.asarray(image), kind, sixteen=image.mode.startswith("I;16")))
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_array(given: Any, kind: Kind) -> Image.Image:
    values = _values(given, kind)
    shape = list(values.shape)
    if values.ndim == 4 and shape[0] == 1:
        values = values[0]
    channels_first = values.ndim == 3 and values.shape[0] in (1, 3, 4)
    channels_last = values.ndim == 3 and values.shape[-1] in (1, 2, 3, 4)
    if values.ndim != 2 and not channels_first and not channels_last:
        raise InputError(f"{_wanted(kind)}, got {shape or type(given).__name__}.")
    if 0 in shape:
        raise InputError(f"the {kind} is empty: its shape is {shape}.")
    if channels_first and (isinstance(given, Tensor) or not channels_last):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 3 and values.dtype == np.bool_ and (values != values[..., :1]).any():
        raise InputError(f"{_wanted(kind)}, got {values.shape[-1]} of them in one array; pass one alone.")
    return Image.fromarray(_bytes(values, kind))


def _values(given: Any, kind: Kind) -> NDArray[Any]:
    """The numbers of an array, tensor or nested list."""
    try:
        if isinstance(given, Tensor):
            given = given.detach().cpu()
            # numpy has no bfloat16
            values = (given.float() if given.is_floating_point() else given).numpy()
        else:
            values = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{_wanted(kind)}, got {type(given).__name__}.") from error
    if values.dtype.kind not in "buif":
        raise InputError(f"{_wanted(kind)}, got {type(given).__name__}.")
    return values


def _wanted(kind: Kind) -> str:
    if kind == "mask":
        return "a mask must be a PIL image or numbers of shape [H, W]"
    return "the image must be a PIL image or numbers of shape [H, W, 3] or [3, H, W]"


def _bytes(values: NDArray[Any], kind: Kind, *, sixteen: bool = False) -> NDArray[np.uint8]:
    """Numbers as 8 bits.

    Args:
        sixteen: the numbers are known to have 16 bits, so that small ones are dark. Not so for masks: one in which
            nothing is above 255 of 65535 would be of no use.
    """
    low, high = values.min(), values.max()
    if kind == "mask" and values.dtype.kind in "ui" and low >= 0 and high == 1:
        return (values * 255).astype(np.uint8)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    scale = None
    if values.dtype.kind == "b":
        scale = 255.0
    elif values.dtype.kind == "f":
        if low >= -_TOLERANCE and high <= 1 + _TOLERANCE:
            scale = 255.0
        elif low >= 0 and high <= 255 and bool((values == np.rint(values)).all()):
            scale = 1.0
    elif low >= 0:
        largest = min(int(np.iinfo(values.dtype).max), 65535)
        if high <= 255 and not (sixteen and kind == "image"):
            scale = 1.0
        elif high <= largest:
            scale = 255 / largest
    if scale is None:
        raise InputError(
            f"the {kind}'s numbers must be from 0 to 1, or whole from 0 to 255 or 65535; got {low} to {high}."
        )
    return np.rint(values.astype(np.float64) * scale).clip(0, 255).astype(np.uint8)
