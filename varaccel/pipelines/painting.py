"""What pipelines share that paint into images: where an image comes from, its tokens, and out-painting."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.pipelines.base import JobT, SettingsT, TokenPipeline
from varaccel.pipelines.inpainting import MaskedImage, PlacedImage, Source
from varaccel.pipelines.output import ImageOutput


class PaintingPipeline(TokenPipeline[SettingsT, JobT], abstract=True):
    """A pipeline that paints into images, without training for it: tokens of what stays are given on the canvas.

    A subclass implements `inpaint`, whose settings carry the `_source`, and fits it to the canvas in `_new_canvas`.
    """

    @abstractmethod
    def inpaint(
        self, image: Any, mask: Any, prompt: str | int | None = None, *arguments: Any, **options: Any
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Paint a part of an image anew."""

    def outpaint(
        self,
        image: Any,
        box: tuple[int, int, int, int],
        prompt: str | int | None = None,
        **options: Any,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Paint what is around an image.

        Args:
            image: see `inpaint`; scaled to the box.
            box: where it stands in the result, (left, top, right, bottom) in pixels.
            prompt, options: as in `inpaint`.

        Raises:
            InputError: any argument that cannot be used.
        """
        return self.inpaint(PlacedImage.of(image, box), None, prompt, **options)

    @staticmethod
    def _source(image: Any, mask: Any) -> Source:
        """What `inpaint` was given, or `outpaint`, whose mask follows from a size that is not known yet.

        Raises:
            InputError: no image, or a mask that does not fit it.
        """
        return image if isinstance(image, PlacedImage) else MaskedImage.of(image, mask)

    def _encode(self, images: Tensor) -> Tensor:
        """Token ids of images [1, 3, H, W] in [-1, 1], as the transformer numbers them.

        Returns:
            [1, h, w], or [1, L] of all scales.

        Raises:
            InputError: an image tokenizer that only decodes.
        """
        vq_model = self.image_tokenizer
        if not hasattr(vq_model, "encode_tokens"):
            raise InputError(
                f"a {type(vq_model).__name__} cannot make tokens of an image, so nothing can be painted into one; use "
                "an image tokenizer with `encode_tokens`."
            )
        self._bring("pixels")
        token_ids: Tensor = vq_model.encode_tokens(images.to(vq_model.dtype))
        return token_ids
