"""Emu3 (Wang et al. 2024, arXiv 2409.18869)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from varaccel.errors import InputError
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.models.transformers_host.image_vocabulary import ImageVocabulary


class Emu3Host(TransformersHost):
    """`Emu3ForConditionalGeneration`: any grid, each row with an end of line, tokens of the text vocabulary.

    Image token ids are those of the image tokenizer; the end of line comes after the last of them.

    Raises:
        InputError: a model whose vocabulary has no image tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        mapping = model.model.vocabulary_mapping
        known: dict[int, int] = mapping.img2bpe
        if not known or sorted(known) != list(range(len(known))) or mapping.eol_token_id is None:
            raise InputError(
                "the vocabulary_map of this Emu3 names no image tokens and end of line; load the model with the "
                "configuration that was published for it."
            )
        self._vocabulary = ImageVocabulary(
            [*(known[code] for code in range(len(known))), mapping.eol_token_id]
        )

    @property
    def decoder(self) -> Any:
        return self.model.model.text_model

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def end_of_line(self) -> int:
        """Id of the token that ends a row."""
        return len(self._vocabulary) - 1

    def text_ids(self, tokens: Tensor) -> Tensor:
        """Image token ids as ids of the text vocabulary, in any shape."""
        return self._vocabulary.text_ids(tokens)

    def unconditional(self, values: Tensor) -> Tensor:
        raise InputError("guidance of Emu3 leads away from a negative prompt; give the condition one.")

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embeddings: Tensor = self.prompt_embedding(self.text_ids(tokens))
        return embeddings

    def head(self, features: Tensor) -> Tensor:
        return self._vocabulary.logits(self.model.lm_head, features)
