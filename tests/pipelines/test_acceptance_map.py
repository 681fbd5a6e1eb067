"""The acceptance map: colours in the order of the passes, and one map per image of a call."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import GRID, PROMPTS, pipeline
from varaccel import InputError, ZipAR
from varaccel.pipelines.acceptance_map import acceptance_map, pass_colors


def _lightness(colors: np.ndarray) -> np.ndarray:
    """CIE lightness L* of sRGB colours [..., 3]."""
    unit = colors / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def _centres(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The colour in the middle of every token of a map without a legend."""
    height, width = image.height // rows, image.width // columns
    return np.asarray(image)[height // 2 :: height, width // 2 :: width][:rows, :columns]


@pytest.mark.parametrize("passes", [2, 7, 256, 2304])
def test_lightness_rises_evenly_with_the_pass(passes: int) -> None:
    lightness = _lightness(pass_colors(np.linspace(1, passes, min(passes, 12)).astype(int), passes))
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert steps.max() < 2 * steps.min()


def test_first_last_and_empty() -> None:
    colors = pass_colors(np.array([1, 9, 0]), 9).tolist()
    assert colors == [[68, 1, 84], [253, 231, 37], [225, 225, 225]]
    assert pass_colors(np.array([1]), 1).tolist() == [[68, 1, 84]]


@pytest.mark.parametrize("size", [4, 7, 64, 300])
def test_every_token_has_its_colour(size: int) -> None:
    written = torch.tensor([[1, 2, 3, 0], [3, 4, 5, 6]], dtype=torch.int32)
    image = acceptance_map(written, 6, size, legend=False)
    assert image.size == (size // 4 * 4, size // 4 * 2)
    np.testing.assert_array_equal(_centres(image, 2, 4), pass_colors(written.numpy(), 6))


def test_legend_holds_the_scale() -> None:
    written = np.arange(1, 17).reshape(4, 4)
    plain, told = (acceptance_map(written, 16, 256, legend=legend) for legend in (False, True))
    assert told.width == plain.width
    assert told.height > plain.height
    assert told.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    middle = np.asarray(told)[(plain.height + told.height) // 2]
    shown = {tuple(color) for color in middle.tolist()}
    assert {tuple(color) for color in pass_colors(np.arange(1, 17), 16).tolist()} <= shown
    assert acceptance_map(written, 16, 64).height == 64, "too narrow for words"


def test_one_pass() -> None:
    image = acceptance_map(np.ones((3, 3), dtype=np.int64), 1, 300)
    np.testing.assert_array_equal(np.asarray(image)[50, 50], [68, 1, 84])


def test_image_under_the_colours() -> None:
    written = np.array([[1, 2], [3, 4]])
    image = Image.new("RGB", (32, 32), "black")
    image.paste((255, 255, 255), (0, 0, 32, 16))
    colors = pass_colors(written, 4)
    over = acceptance_map(written, 4, 64, image=image, opacity=0.5, legend=False)
    expected = (colors.astype(float) + np.array([255, 0])[:, None, None]) / 2
    np.testing.assert_allclose(_centres(over, 2, 2), expected, atol=1)
    hidden = acceptance_map(written, 4, 64, image=image, opacity=1, legend=False)
    np.testing.assert_array_equal(_centres(hidden, 2, 2), colors)


@pytest.mark.parametrize(
    ("written", "options", "words"),
    [
        (np.ones((2, 2, 2), dtype=int), {}, r"\[h, w\]"),
        (np.ones((2, 2)), {}, "float64"),
        (np.zeros((0, 2), dtype=int), {}, r"\[0, 2\]"),
        (np.array([[1, 5]]), {"passes": 4}, "to 4, got 1 to 5"),
        (np.array([[-1, 2]]), {"passes": 4}, "got -1 to 2"),
        (np.array([[0]]), {"passes": 0}, "counted from 1"),
        (np.array([[1]]), {"opacity": 1.5}, "opacity"),
        (np.ones((2, 30), dtype=int), {"size": 20}, "size of 30, got 20"),
    ],
    ids=["batch", "float", "empty", "late", "negative", "none", "opacity", "small"],
)
def test_refusals(written: np.ndarray, options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        acceptance_map(written, **{"passes": 2, **options})  # type: ignore[arg-type]


# -- of a call -----------------------------------------------------------------------------------------


def test_one_map_per_image() -> None:
    out = pipeline("t2i")(PROMPTS["t2i"], seed=0, accelerator=ZipAR(2))
    maps = out.acceptance_maps(64, legend=False)
    assert [image.size for image in maps] == [(64, 64)] * len(PROMPTS["t2i"])
    row, column = np.mgrid[:GRID, :GRID]
    expected = pass_colors(1 + column + 2 * row, out.stats.passes)
    for image in maps:
        np.testing.assert_array_equal(_centres(image, GRID, GRID), expected)
    latent = pipeline("t2i")(PROMPTS["t2i"], seed=0, accelerator=ZipAR(2), output_type="latent")
    assert latent.acceptance_maps(64, legend=False)[0].tobytes() == maps[0].tobytes()


def test_overlay_of_a_call() -> None:
    out = pipeline("t2i")(PROMPTS["t2i"][:2], seed=0)
    first, second = out.acceptance_maps(64, overlay=True, legend=False)
    assert first.tobytes() != second.tobytes()
    arrays = pipeline("t2i")(PROMPTS["t2i"][:2], seed=0, output_type="np")
    with pytest.raises(InputError, match="output_type='pil'"):
        arrays.acceptance_maps(64, overlay=True)
    with pytest.raises(InputError, match=f"needs a size of {GRID}"):
        out.acceptance_maps(GRID - 1)


def test_tokens_that_are_no_grid_have_no_map() -> None:
    out = pipeline("t2i")(PROMPTS["t2i"][:1], seed=0)
    out.written = out.written.flatten(1)
    with pytest.raises(InputError, match="next-scale"):
        out.acceptance_maps()


def test_needs_no_plotting_library() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import numpy as np\n"
        "from varaccel.pipelines.acceptance_map import acceptance_map\n"
        "acceptance_map(np.ones((2, 2), dtype=int), 1)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
