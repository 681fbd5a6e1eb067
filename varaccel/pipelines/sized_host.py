"""Pipelines of models of transformers that draw images of any size."""

from __future__ import annotations

from varaccel.errors import InputError
from varaccel.pipelines.image_sizes import ratio_size, whole_tokens
from varaccel.pipelines.transformers_host import TransformersPipeline


class SizedTransformersPipeline(TransformersPipeline, abstract=True):
    """A pipeline whose settings `height` and `width` are the size of images unless a call says otherwise."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels unless a call says otherwise.

        Raises:
            InputError: images that are not square.
        """
        if self.config.height != self.config.width:
            raise InputError(
                f"the images of this pipeline are no squares: {self.config.height} × {self.config.width}."
            )
        return int(self.config.height)

    def _check_size(self, size: tuple[int, int]) -> None:
        """What a model says of a size (height, width) of whole tokens.

        Raises:
            InputError: a size that it cannot draw.
        """

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        size = whole_tokens(
            self.config.height if height is None else height,
            self.config.width if width is None else width,
            self.vq_model.downsample_factor,
        )
        self._check_size(size)
        return size

    def _ratio_size(self, ratio: str) -> tuple[int, int]:
        # as the processors of the models do it: about as many pixels, each side rounded to whole tokens
        pixels = self.config.height * self.config.width
        return self._size(*ratio_size(ratio, pixels, self.vq_model.downsample_factor))
