"""What accelerators draw of the same prompts and seeds, as sheets of images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varaccel.accelerators import AnyAccelerator
from varaccel.engine.statistics import telling
from varaccel.errors import InputError
from varaccel.evaluation.bench.report import with_plain
from varaccel.evaluation.speed.call_speed import naming
from varaccel.pipelines.acceptance_map import pass_colors
from varaccel.pipelines.output import ImageOutput

_MARGIN = 6

_LEFT = 190
"""Width of what stands beside a row of a sheet, in pixels."""

_LEGEND = 30
"""Height of the legend below a sheet of maps, in pixels."""


@dataclass(frozen=True)
class Samples:
    """What accelerators draw of the same prompts and seeds.

    Attributes:
        prompts: of the images, in order.
        outputs: an accelerator and its call of all `prompts`, with PIL images, a pair per accelerator.
    """

    prompts: tuple[str | int, ...]
    outputs: tuple[tuple[AnyAccelerator, ImageOutput], ...]

    def sheet(self, side: int = 160) -> Image.Image:
        """A row of images per accelerator under their prompts.

        Args:
            side: of an image on the sheet in pixels.
        """
        return self._rows(
            [[image.convert("RGB") for image in output.images] for _, output in self.outputs], side
        )

    def maps(self, side: int = 160) -> Image.Image | None:
        """The same images in grey under which pass decided each token, from dark to bright, with a legend.

        None for models whose tokens are not one grid, next-scale ones: there is no such map.

        Args:
            side: of an image on the sheet in pixels.
        """
        if any(output.written.ndim != 3 for _, output in self.outputs):
            return None
        rows = [
            output.acceptance_maps(max(side, *output.written.shape[1:]), overlay=True, legend=False)
            for _, output in self.outputs
        ]
        sheet = self._rows(rows, side, below=_LEGEND)
        small = ImageFont.load_default(12)
        draw = ImageDraw.Draw(sheet)
        middle = sheet.height - _LEGEND // 2
        first, last = "first pass of the call", "last"
        draw.text((_LEFT, middle), first, "black", small, anchor="lm")
        left = _LEFT + round(draw.textlength(first, small)) + _MARGIN
        right = sheet.width - 2 * _MARGIN - round(draw.textlength(last, small))
        draw.text((right + _MARGIN, middle), last, "black", small, anchor="lm")
        # a sheet of one small image has no room for it
        if right > left:
            numbers = np.arange(1, right - left + 1)
            ramp = Image.fromarray(pass_colors(numbers[None], len(numbers)))
            sheet.paste(ramp.resize((len(numbers), 14), Image.Resampling.NEAREST), (left, middle - 7))
        return sheet

    def _rows(self, rows: Sequence[Sequence[Image.Image]], side: int, below: int = 0) -> Image.Image:
        """Rows of images, each beside its accelerator and what it cost, under the prompts.

        Args:
            below: height to be left free below them in pixels.
        """
        small, bold = ImageFont.load_default(12), ImageFont.load_default(15)
        wrapped = [textwrap.wrap(str(prompt), side // 7, break_long_words=True) for prompt in self.prompts]
        top = 2 * _MARGIN + 15 * max(map(len, wrapped))
        step = side + _MARGIN
        sheet = Image.new("RGB", (_LEFT + len(wrapped) * step, top + len(rows) * step + below), "white")
        draw = ImageDraw.Draw(sheet)
        for column, lines in enumerate(wrapped):
            draw.multiline_text((_LEFT + column * step, _MARGIN), "\n".join(lines), "black", small)
        for index, ((accelerator, output), images) in enumerate(zip(self.outputs, rows, strict=True)):
            height = top + index * step
            stats = output.stats
            draw.text((_MARGIN, height), accelerator.name, "black", bold)
            options = [
                line
                for k, v in telling(stats.accelerator, stats.options).items()
                for line in textwrap.wrap(f"{k}={v}", 26)
            ]
            lines = [*options, f"{stats.passes} passes", f"{stats.tokens_per_pass:.2f} tokens per pass"]
            draw.multiline_text((_MARGIN, height + 22), "\n".join(lines), "#444444", small)
            for column, image in enumerate(images):
                shown = image.resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(shown, (_LEFT + column * step, height))
        return sheet


def draw_samples(
    pipe: Any,
    accelerators: Sequence[AnyAccelerator],
    prompts: Sequence[str | int],
    *,
    seed: int = 0,
    **call: Any,
) -> Samples:
    """What plain decoding and then each accelerator draw of `prompts`, in one call each.

    Args:
        prompts: image i has seed `seed` + i.
        call: further arguments of the pipeline call.

    Raises:
        InputError: no prompts; an accelerator that cannot be used here, by its label.
    """
    if not prompts:
        raise InputError("a sheet of samples needs at least one prompt.")
    outputs = []
    for accelerator in with_plain(accelerators):
        with naming(accelerator):
            outputs.append((accelerator, pipe(list(prompts), accelerator=accelerator, seed=seed, **call)))
    return Samples(tuple(prompts), tuple(outputs))


def sample_sheet(
    pipe: Any,
    accelerators: Sequence[AnyAccelerator],
    prompts: Sequence[str | int],
    *,
    seed: int = 0,
    side: int = 160,
    **call: Any,
) -> Image.Image:
    """A row per accelerator, plain decoding first, and a column per prompt, of the same seeds.

    Args:
        prompts: one call per accelerator draws all of them; image i has seed `seed` + i.
        side: of an image on the sheet in pixels.
        call: further arguments of the pipeline call.

    Raises:
        InputError: no prompts; an accelerator that cannot be used here, by its label.
    """
    return draw_samples(pipe, accelerators, prompts, seed=seed, **call).sheet(side)


def acceptance_sheet(
    pipe: Any,
    accelerators: Sequence[AnyAccelerator],
    prompt: str | int,
    *,
    seed: int = 0,
    side: int = 256,
    **call: Any,
) -> Image.Image | None:
    """How each accelerator, plain decoding first, came by its image of `prompt`; see `Samples.maps`.

    Args:
        seed: of the image.
        side: of an image on the sheet in pixels.
        call: further arguments of the pipeline call.

    Raises:
        InputError: an accelerator that cannot be used here, by its label.
    """
    return draw_samples(pipe, accelerators, [prompt], seed=seed, **call).maps(side)
