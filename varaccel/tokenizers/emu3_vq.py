"""The image tokenizer of Emu3, with the names that pipelines know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Emu3ImageTokenizer:
    """The `Emu3VQVAE` of an Emu3 model, for images of any size; it keeps no weights of its own.

    Args:
        vqmodel: the part of the model.
        mean, std: of each colour, with which the pixels were normalised from [0, 1]; as the image processor says.
    """

    def __init__(
        self, vqmodel: Any, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
    ) -> None:
        self.vqmodel = vqmodel
        self._mean, self._std = tuple(mean), tuple(std)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vqmodel.dtype
        return dtype

    @property
    def codebook(self) -> Tensor:
        """[C, channels] vectors of the token ids."""
        codebook: Tensor = self.vqmodel.quantize.embedding.weight
        return codebook

    @property
    def codebook_size(self) -> int:
        return int(self.vqmodel.config.codebook_size)

    @property
    def downsample_factor(self) -> int:
        """Pixels per token and axis."""
        return int(self.vqmodel.spatial_scale_factor)

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, h, w] -> images [B, 3, H, W] in about [-1, 1]."""
        pixels: Tensor = self.vqmodel.decode(token_ids.to(self.codebook.device)).float()
        mean, std = self._colours(pixels)
        return (pixels * std + mean) * 2 - 1

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> token ids [B, h, w]."""
        mean, std = self._colours(pixels)
        normal = ((pixels / 2 + 0.5 - mean) / std).to(self.dtype)
        sizes = [tuple(pixels.shape[-2:])] * len(pixels)
        return torch.stack(self.vqmodel.encode(normal, sizes).image_tokens)

    def _colours(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self._mean, self._std))
        return mean, std
