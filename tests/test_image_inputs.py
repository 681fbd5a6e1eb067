"""Images and masks of every mode, type and shape, read from files or handed over."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from varaccel import InputError
from varaccel.evaluation.metrics.image_sets import ImageFolder
from varaccel.image_files import read_image
from varaccel.image_inputs import marked_pixels, rgb_image

WIDTH, HEIGHT = 12, 8
LEFT = np.zeros((HEIGHT, WIDTH), bool)
LEFT[:, : WIDTH // 4] = True
"""What all masks of this file mark: the left quarter."""


def grey(bright: float, dark: float, dtype: Any = np.uint8) -> np.ndarray:
    """Bright in the left quarter, dark elsewhere."""
    return np.where(LEFT, bright, dark).astype(dtype)


def colours(bright: tuple[int, ...], dark: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(LEFT[..., None], bright, dark).astype(np.uint8))


def palette(*, transparent: bool = False) -> Image.Image:
    image = Image.fromarray(grey(3, 7)).copy()
    image.putpalette([0] * 9 + [255, 255, 255] + [0] * 12)
    if transparent:
        image.info["transparency"] = 7
    return image


def labels(image: Image.Image) -> Image.Image:
    image.putpalette([0, 0, 0, 128, 0, 0])  # as the label images of PASCAL VOC
    return image


def with_transparent_black(mode: str) -> Image.Image:
    image = Image.fromarray(grey(255, 0)).convert(mode)
    image.info["transparency"] = 0 if mode == "L" else (0, 0, 0)
    return image


MODES: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "1": (lambda: Image.fromarray(LEFT), (255, 0)),
    "L": (lambda: Image.fromarray(grey(200, 40)), (200, 40)),
    "L with transparent black": (lambda: with_transparent_black("L"), (255, 255)),
    "LA": (
        lambda: Image.merge("LA", [Image.fromarray(grey(200, 200)), Image.fromarray(grey(255, 0))]),
        (200, 255),
    ),
    "P": (palette, (255, 0)),
    "P with transparency": (lambda: palette(transparent=True), (255, 255)),
    "RGB": (lambda: colours((200, 200, 200), (40, 40, 40)), (200, 40)),
    "RGB with transparent black": (lambda: with_transparent_black("RGB"), (255, 255)),
    "RGBA": (lambda: colours((90, 90, 90, 255), (90, 90, 90, 0)), (90, 255)),
    "RGBa": (lambda: colours((90, 90, 90, 255), (90, 90, 90, 0)).convert("RGBa"), (90, 255)),
    "La": (lambda: colours((90, 255), (90, 0)).convert("La"), (90, 255)),
    "PA": (lambda: palette().convert("PA"), (255, 0)),
    "RGBX": (lambda: colours((200, 200, 200), (40, 40, 40)).convert("RGBX"), (200, 40)),
    "CMYK": (lambda: colours((200, 200, 200), (40, 40, 40)).convert("CMYK"), (200, 40)),
    "YCbCr": (lambda: colours((200, 200, 200), (40, 40, 40)).convert("YCbCr"), (200, 40)),
    "HSV": (lambda: colours((200, 200, 200), (40, 40, 40)).convert("HSV"), (200, 40)),
    "I;16": (lambda: Image.fromarray(grey(200 * 257, 40 * 257, np.uint16)), (200, 40)),
    "I;16B": (
        lambda: Image.frombytes("I;16B", (WIDTH, HEIGHT), grey(51400, 10280, ">u2").tobytes()),
        (200, 40),
    ),
    "I of 16 bits": (lambda: Image.fromarray(grey(200 * 257, 40 * 257, np.int32)), (200, 40)),
    "I of 8 bits": (lambda: Image.fromarray(grey(200, 40, np.int32)), (200, 40)),
    "F from 0 to 1": (lambda: Image.fromarray(grey(0.8, 0.2, np.float32)), (204, 51)),
    "F from 0 to 255": (lambda: Image.fromarray(grey(200, 40)).convert("F"), (200, 40)),
    "uint8": (lambda: grey(200, 40), (200, 40)),
    "bool": (lambda: LEFT, (255, 0)),
    "float32": (lambda: grey(0.8, 0.2, np.float32), (204, 51)),
    "float64, big end first": (lambda: grey(0.8, 0.2, ">f8"), (204, 51)),
    "float16": (lambda: grey(200 / 255, 0, np.float16), (200, 0)),
    "floats of 8 bits": (lambda: grey(200, 40, np.float32), (200, 40)),
    "int16 of 8 bits": (lambda: grey(200, 40, np.int16), (200, 40)),
    "int16": (lambda: grey(32767, 0, np.int16), (255, 0)),
    "uint16": (lambda: grey(200 * 257, 40 * 257, np.uint16), (200, 40)),
    "uint16, big end first": (lambda: grey(200 * 257, 40 * 257, ">u2"), (200, 40)),
    "int64 of 8 bits": (lambda: grey(200, 40, np.int64), (200, 40)),
    "a channel of its own, last": (lambda: grey(200, 40)[..., None], (200, 40)),
    "a channel of its own, first": (lambda: grey(200, 40)[None], (200, 40)),
    "a batch of one": (lambda: grey(200, 40)[None, None], (200, 40)),
    "HWC": (lambda: np.asarray(colours((200, 200, 200), (40, 40, 40))), (200, 40)),
    "HWC with alpha": (lambda: np.asarray(colours((90, 90, 90, 255), (90, 90, 90, 0))), (90, 255)),
    "HWC, grey and alpha": (lambda: np.stack([grey(90, 90), grey(255, 0)], -1), (90, 255)),
    "CHW": (lambda: np.stack([grey(200, 40)] * 3), (200, 40)),
    "CHW, a tensor": (lambda: torch.from_numpy(grey(0.8, 0.2, np.float32)).expand(3, -1, -1), (204, 51)),
    "HWC, a tensor": (lambda: torch.from_numpy(grey(200, 40))[..., None].expand(-1, -1, 3), (200, 40)),
    "a batch of one, a tensor": (lambda: torch.from_numpy(grey(200, 40)).expand(1, 3, -1, -1), (200, 40)),
    "bfloat16, a tensor": (lambda: torch.from_numpy(LEFT).to(torch.bfloat16), (255, 0)),
    "a tensor that is learned": (lambda: torch.from_numpy(grey(1, 0, np.float32)).requires_grad_(), (255, 0)),
    "bool, a tensor": (lambda: torch.from_numpy(LEFT), (255, 0)),
    "negative strides": (lambda: grey(200, 40)[::-1, ::-1][:, ::-1], (200, 40)),
    "read-only": (lambda: np.broadcast_to(grey(200, 40)[0], (HEIGHT, WIDTH)), (200, 40)),
    "nested lists": (lambda: grey(200, 40).tolist(), (200, 40)),
}
"""How an image is made whose left quarter is marked, and its brightness there and elsewhere; as a mask, too."""


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    make, (bright, dark) = MODES[mode]
    shown = rgb_image(make())
    assert (shown.mode, shown.size) == ("RGB", (WIDTH, HEIGHT))
    assert np.abs(np.asarray(shown).astype(int) - grey(bright, dark, int)[..., None]).max() <= 1
    assert np.array_equal(marked_pixels(make()), LEFT), "the left quarter, by brightness or by alpha"


def test_an_ordinary_image_is_left_as_it_is() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    assert rgb_image(image) is image
    opaque = image.copy()
    opaque.putalpha(255)
    assert rgb_image(opaque).tobytes() == image.tobytes()


def test_half_transparent_colours_are_mixed_with_white() -> None:
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    assert np.abs(np.asarray(rgb_image(image))[0, 0].astype(int) - (127, 177, 227)).max() <= 1


# -- masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, bool])
@pytest.mark.parametrize("as_image", [False, True])
def test_labels_of_zero_and_one(dtype: Any, as_image: bool) -> None:
    mask: Any = LEFT.astype(dtype)
    if as_image:
        if dtype in (np.int16, np.int64):
            pytest.skip("Pillow has no such mode")
        mask = Image.fromarray(mask)
    assert np.array_equal(marked_pixels(mask), LEFT)


def test_labels_of_other_kinds() -> None:
    ones = Image.fromarray(grey(1, 0))
    assert np.array_equal(marked_pixels(labels(ones.copy())), LEFT), "a palette image with a dark colour"
    assert np.array_equal(marked_pixels(ones.convert("RGB")), LEFT)
    assert np.array_equal(marked_pixels(torch.from_numpy(grey(1, 0))[None]), LEFT)
    assert np.array_equal(marked_pixels(grey(255, 0, np.uint16)), LEFT), "8 bits in a wider type"
    assert np.array_equal(marked_pixels(Image.fromarray(grey(255, 0, np.uint16))), LEFT)
    assert not marked_pixels(np.zeros((4, 4), np.int64)).any()
    assert marked_pixels(np.ones((4, 4), np.int64)).all()


@pytest.mark.parametrize(
    ("bright", "dark"),
    [
        ((255, 255, 255, 255), (255, 255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0, 0)),
        ((0, 0, 0, 255), (255, 255, 255, 0)),
        ((255, 255, 255, 255), (0, 0, 0, 0)),
        ((255, 0, 0, 255), (0, 0, 0, 0)),
        ((255, 255, 255, 100), (255, 255, 255, 0)),
        ((255, 255, 255, 255), (0, 0, 0, 255)),
        ((255, 255, 255, 60), (0, 0, 0, 60)),
    ],
    ids=[
        "white",
        "black",
        "black on white",
        "white on black",
        "red",
        "half transparent brush",
        "opaque",
        "even",
    ],
)
def test_strokes_on_a_transparent_layer(bright: tuple[int, ...], dark: tuple[int, ...]) -> None:
    mask = colours(bright, dark)
    assert np.array_equal(marked_pixels(mask), LEFT)
    assert np.array_equal(marked_pixels(np.asarray(mask)), LEFT)
    assert np.array_equal(marked_pixels(torch.from_numpy(np.array(mask)).permute(2, 0, 1)), LEFT)
    if len(set(bright[:3])) == 1:
        assert np.array_equal(marked_pixels(mask.convert("LA")), LEFT)


def test_black_and_white_paint_on_a_transparent_layer() -> None:
    mask = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    mask[LEFT] = 255
    mask[:, -5:, 3] = 255  # black paint
    assert np.array_equal(marked_pixels(Image.fromarray(mask)), LEFT)


@pytest.mark.parametrize("colour", [255, 0], ids=["white", "black"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_hole_is_not_taken_for_strokes(colour: int, mode: str) -> None:
    with pytest.raises(InputError, match="alpha channel that is opaque on 75%"):
        marked_pixels(colours((colour, colour, colour, 0), (colour, colour, colour, 255)).convert(mode))


def test_a_large_hole_is_not_taken_for_strokes() -> None:
    mask = np.full((20, 20, 4), 255, np.uint8)
    mask[2:-2, 2:-2, 3] = 0
    with pytest.raises(InputError, match="alpha channel"):
        marked_pixels(Image.fromarray(mask))


def test_an_image_with_a_hole_is_no_mask() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (20, 20, 4), np.uint8)
    photo[..., 3] = 255
    photo[:, :15, 3] = 0
    with pytest.raises(InputError, match="alpha channel and colours"):
        marked_pixels(Image.fromarray(photo))


def test_a_transparent_mask() -> None:
    with pytest.raises(InputError, match="transparent everywhere"):
        marked_pixels(Image.new("RGBA", (5, 5)))


# -- orientation ---------------------------------------------------------------------------------------

ORIENTATIONS = range(1, 9)


def stored(image: Image.Image, orientation: int) -> Image.Image:
    """An image as a camera that was turned stores it: turning it by `orientation` gives `image` again."""
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        7: Image.Transpose.TRANSVERSE,
        **inverse,
    }
    turned = image.transpose(turns[orientation]) if orientation in turns else image.copy()
    turned.getexif()[0x0112] = orientation
    return turned


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_images_and_masks_are_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    image = Image.new("RGB", (48, 32))
    image.paste("white", (0, 0, 16, 16))
    path = tmp_path / f"turned{suffix}"
    turned = stored(image, orientation)
    turned.save(path, exif=turned.getexif(), quality=95)
    with Image.open(path) as opened:
        assert opened.getexif().get(0x0112) == orientation
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("L")) > 127
        assert expected.sum() == 256, "as a viewer shows it"
        assert np.array_equal(marked_pixels(opened), expected)
    for read in (read_image(path), rgb_image(read_image(path)), Image.open(path)):
        assert rgb_image(read).size == (48, 32)
        assert np.array_equal(marked_pixels(read), expected)
        assert np.array_equal(np.asarray(rgb_image(read).convert("L")) > 127, expected)
    if suffix != ".tif":
        (found,) = ImageFolder(tmp_path)
        assert np.array_equal(found.float().mean(0).numpy() > 127, expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_orientations_are_none(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    for index, exif in enumerate((b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")):
        path = tmp_path / f"{index}.jpg"
        image.save(path, exif=exif)
        assert rgb_image(read_image(path)).size == (40, 20)
    image.getexif()[0x0112] = 77
    assert rgb_image(image).size == (40, 20)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [rgb_image, marked_pixels])
@pytest.mark.parametrize(
    "given",
    [
        "cat.png",
        None,
        3,
        ...,
        [[1, 2], [3]],
        np.zeros(5),
        np.zeros((2, 5, 5)),
        np.zeros((5, 5, 6)),
        np.zeros((2, 5, 5, 3)),
        np.zeros((1, 1, 5, 5, 3)),
        np.zeros((5, 5), complex),
        np.array([["a", "b"]]),
        np.full((5, 5), np.nan),
        np.full((5, 5), np.inf),
        np.full((5, 5), -0.5),
        np.full((5, 5), 1.5),
        np.full((5, 5), -1),
        np.full((5, 5), 70000),
        np.zeros((0, 5)),
        np.zeros((5, 0, 3)),
        torch.zeros(3, 0, 0),
        torch.zeros(5, 5, dtype=torch.complex64),
        torch.zeros(5, 5, device="meta"),
        Image.new("RGB", (0, 0)),
        Image.new("L", (0, 7)),
        [],
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'shape', getattr(value, 'size', value))}"[:40],
)
def test_what_is_no_image(read: Any, given: Any) -> None:
    with pytest.raises(InputError, match="mask" if read is marked_pixels else "image") as refused:
        read(given)
    assert "\n" not in str(refused.value)


def test_several_masks_in_one_array() -> None:
    """As SAM returns them."""
    with pytest.raises(InputError, match="3 of them in one array"):
        marked_pixels(np.stack([LEFT, ~LEFT, LEFT]))


def damaged_files(folder: Path) -> list[Path]:
    """Files that are not, or not wholly, images; each needs another error of Pillow to be caught."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png(width: int, *chunks: bytes) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")

    whole = folder / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    contents = {
        "bomb.png": png(20000, chunk(b"IDAT", zlib.compress(b"0" * 99))),
        "text_bomb.png": png(
            8,
            chunk(b"zTXt", b"a\0\0" + zlib.compress(b"0" * 2**21)),
            chunk(b"IDAT", zlib.compress(b"0" * 200)),
        ),
        "empty.png": b"",
        "text.png": b"no image",
        "cut.png": whole.read_bytes()[:2000],
        "header.png": whole.read_bytes()[:20],
        "checksum.png": whole.read_bytes().replace(b"IDAT", b"IDAX"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return [
        folder / name for name in (*contents, "folder.png", "missing.png", "a" * 300 + ".png", "a\0b.png")
    ]


def test_damaged_files(tmp_path: Path) -> None:
    for path in damaged_files(tmp_path):
        with pytest.raises(InputError, match="cannot be read as an image"):
            read_image(path)


def test_a_cut_file_that_was_opened_before(tmp_path: Path) -> None:
    damaged_files(tmp_path)
    with (
        Image.open(tmp_path / "cut.png") as image,
        pytest.raises(InputError, match="the image cannot be read"),
    ):
        rgb_image(image)


def test_the_first_of_several_images_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "b.tif", "c.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.asarray(rgb_image(read_image(tmp_path / name)))[4, 4, 0] > 200
