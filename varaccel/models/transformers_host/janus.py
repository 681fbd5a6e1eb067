"""Janus and Janus-Pro (Chen et al. 2025, arXiv 2501.17811)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from varaccel.models.transformers_host.host import TransformersHost


class JanusHost(TransformersHost):
    """`JanusForConditionalGeneration`: a square grid of tokens with embeddings and a head of their own."""

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def vocab_size(self) -> int:
        return int(self.model.model.vqmodel.config.num_embeddings)

    @property
    def layout(self) -> tuple[int, ...]:
        return (int(self.model.model.vqmodel.config.num_patches),)

    def unconditional(self, values: Tensor) -> Tensor:
        """The prompt with padding in the place of every token but those that begin text and image (published)."""
        generation = self.model.generation_config
        kept = (values == generation.bos_token_id) | (values == generation.generation_kwargs["boi_token_id"])
        return values.where(kept, generation.pad_token_id)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embeddings: Tensor = self.model.prepare_embeddings_for_image_generation(tokens)
        return embeddings

    def head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model.model.generation_head(features)
        return logits
