"""Pixels as tokens: every pixel is one of a few colours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varaccel.errors import InputError

_PIXELS_AT_ONCE = 65536
"""Compared with all colours; bounds the matrix of distances to 128 MB for 512 colours."""


class ColorClusters:
    """The colours of ImageGPT as an image tokenizer of one pixel per token.

    Args:
        clusters: [V, 3] red, green and blue in [-1, 1] by token id, as ImageGPT's image processor has them.

    Raises:
        InputError: no such table.
    """

    downsample_factor = 1
    """Pixels per token and axis."""
    dtype = torch.float32

    def __init__(self, clusters: Any) -> None:
        if clusters is None:
            raise InputError(
                "the image processor has no colour clusters; load the one that was published with the model."
            )
        self.codebook: Tensor = torch.as_tensor(clusters, dtype=torch.float32)
        """[V, 3]"""
        if self.codebook.dim() != 2 or self.codebook.shape[1] != 3:
            raise InputError(
                f"colour clusters must be a table of red, green and blue, got {list(self.codebook.shape)}."
            )

    @property
    def codebook_size(self) -> int:
        return len(self.codebook)

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, h, w] -> images [B, 3, h, w] in [-1, 1]."""
        return self.codebook.to(token_ids.device)[token_ids].permute(0, 3, 1, 2)

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> ids [B, H, W] of the nearest colours."""
        colors = pixels.float().permute(0, 2, 3, 1)
        table = self.codebook.to(pixels.device)
        nearest = [
            torch.cdist(part, table).argmin(-1) for part in colors.reshape(-1, 3).split(_PIXELS_AT_ONCE)
        ]
        return torch.cat(nearest).view(colors.shape[:3])
