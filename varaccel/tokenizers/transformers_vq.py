"""Image tokenizers of models of transformers, with the names that pipelines know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class JanusImageTokenizer:
    """The `JanusVQVAE` of a Janus model; it keeps no weights of its own.

    Args:
        vqmodel: the part of the model.
    """

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

    @property
    def downsample_factor(self) -> int:
        """Pixels per token and axis."""
        return int(2 ** (len(self.vqmodel.config.channel_multiplier) - 1))

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, h, w] -> images [B, 3, H, W] in about [-1, 1]."""
        pixels: Tensor = self.vqmodel.decode(token_ids.flatten(1))
        return pixels

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> token ids [B, h, w]."""
        token_ids: Tensor = self.vqmodel.encode(pixels.to(self.dtype)).image_tokens
        side = pixels.shape[-1] // self.downsample_factor
        return token_ids.view(len(pixels), -1, side)
