"""The vocabulary of image tokens that GLM-Image draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GlmImageVocabulary:
    """The codebook of a `GlmImageVQVAE`, which has no decoder: pixels are made of the tokens by a diffusion model.

    Args:
        vqmodel: the part of the model; no weights are copied.
    """

    downsample_factor = 32
    """Pixels per token and axis."""

    def __init__(self, vqmodel: Any) -> None:
        self.vqmodel = vqmodel

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vqmodel.dtype
        return dtype

    @property
    def codebook(self) -> Tensor:
        """[V, C] vectors of the token ids."""
        codebook: Tensor = self.vqmodel.quantize.embedding.weight
        return codebook

    @property
    def codebook_size(self) -> int:
        return int(self.vqmodel.config.num_embeddings)
