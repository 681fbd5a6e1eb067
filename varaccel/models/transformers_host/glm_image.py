"""The autoregressive part of GLM-Image (Z.ai 2026, https://huggingface.co/zai-org/GLM-Image)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varaccel.models.transformers_host.host import TransformersHost
from varaccel.nn.devices import HOST
from varaccel.nn.grid import Grid


class GlmImageHost(TransformersHost):
    """`GlmImageForConditionalGeneration`: a small preview grid, then the image, in ids that text tokens follow.

    Of the model's vocabulary only the image tokens can be drawn. Its own `generate()` may also draw the end of the
    image in the midst of it, which leaves an image with tokens missing.
    """

    @property
    def decoder(self) -> Any:
        # not the module around it, which keeps the positions of its last prompt from call to call
        return self.model.model.language_model

    @property
    def vocab_size(self) -> int:
        return int(self.model.model.vqmodel.config.num_embeddings)

    def place_ids(self, grids: Sequence[Grid]) -> Tensor:
        """[N, 3] time, row and column; a grid begins at the maximum side of those before it, on all axes."""
        places, start = [], 0
        for grid in grids:
            row, column = torch.meshgrid(
                torch.arange(grid.height, device=HOST), torch.arange(grid.width, device=HOST), indexing="ij"
            )
            places.append(torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1) + start)
            start += max(grid.height, grid.width)
        return torch.cat(places)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embeddings: Tensor = self.model.get_input_embeddings()(tokens)
        return embeddings

    def head(self, features: Tensor) -> Tensor:
        # The head as a module, so that an offloaded, quantised or divided one works; the ids behind the image tokens,
        # under one per cent of its rows, are cut off afterwards.
        logits: Tensor = self.model.lm_head(features)[..., : self.vocab_size]
        return logits
