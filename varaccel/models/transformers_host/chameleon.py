"""Chameleon (Chameleon Team 2024, arXiv 2405.09818) and Anole (Chern et al. 2024, arXiv 2407.06135)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from varaccel.errors import InputError
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.models.transformers_host.image_vocabulary import ImageVocabulary


class ChameleonHost(TransformersHost):
    """`ChameleonForConditionalGeneration`: a square grid of tokens of the text vocabulary.

    The model's own forward pass forbids image tokens; here its head is read at them alone.

    Raises:
        InputError: a model whose vocabulary has no image tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # named as the tokenizer names them: IMGIMG, the digits of the code as letters A to J, Z
        vocabulary = model.config.vocabulary_map or {}
        known: dict[int, int] = model.model.vocabulary_mapping.img2bpe if vocabulary else {}
        if not known or sorted(known) != list(range(len(known))):
            raise InputError(
                "the vocabulary_map of this Chameleon names no image tokens; load the model with the configuration "
                "that was published for it."
            )
        self._vocabulary = ImageVocabulary([known[code] for code in range(len(known))])

    @property
    def decoder(self) -> Any:
        return self.model.model

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def layout(self) -> tuple[int, ...]:
        images = self.model.model.vqmodel.config
        return (int(images.resolution // 2 ** (len(images.channel_multiplier) - 1)),)

    def unconditional(self, values: Tensor) -> Tensor:
        raise InputError("guidance of Chameleon leads away from another prompt; give the condition one.")

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embeddings: Tensor = self.prompt_embedding(self._vocabulary.text_ids(tokens))
        return embeddings

    def head(self, features: Tensor) -> Tensor:
        return self._vocabulary.logits(self.model.lm_head, features)
