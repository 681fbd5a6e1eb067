"""What a pipeline call returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from PIL import Image

from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.pipelines.acceptance_map import acceptance_map


@dataclass
class ImageOutput(BaseOutput):
    """Images and their cost.

    Attributes:
        images: PIL images, an array [B, H, W, 3] or tensor [B, 3, H, W] in [0, 1], or token ids
            [B, h, w], by `output_type`. Images of one prompt stand together.
        stats: what the call cost.
        written: [B, h, w] int32, the pass that decided each token: the acceptance map. [B, L] for models whose
            tokens are not one grid.
    """

    images: Any
    stats: Statistics
    written: Any

    def acceptance_maps(
        self, size: int = 512, *, overlay: bool = False, legend: bool = True
    ) -> list[Image.Image]:
        """One image per image of which pass decided each token; see `acceptance_map` for how to read it.

        Args:
            size: longer side in pixels, without the legend.
            overlay: show the image in grey under the colours.
            legend: add a bar of the colours.

        Raises:
            InputError: `overlay` of a call whose `images` are not PIL images; `size` below the token grid; a
                model whose tokens are not one grid.
        """
        if self.written.ndim != 3:
            raise InputError(
                "a next-scale model decides whole maps at once, so there is no map of passes to draw."
            )
        passes = max(1, int(self.written.max()))  # of the image that took most
        images: Sequence[Image.Image | None] = [None] * len(self.written)
        if overlay:
            if not isinstance(self.images, list):
                raise InputError("an overlay needs PIL images; make them with output_type='pil'.")
            images = self.images
        return [
            acceptance_map(written, passes, size, image=image, legend=legend)
            for written, image in zip(self.written, images, strict=True)
        ]
