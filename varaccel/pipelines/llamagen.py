"""Images from prompts or classes with LlamaGen (arXiv 2406.06525)."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.pipelines.causal import CausalPipeline
from varaccel.tokenizers.vq import VQModel


class LlamaGenPipeline(CausalPipeline):
    """Text- or class-conditional generation with a LlamaGen transformer, see `CausalPipeline`.

    Text-conditional models come with Flan-T5 as published, or with the word-level encoder of the small shipped
    model; see `varaccel.tokenizers.text`.
    """

    family: ClassVar[str] = "llamagen"

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        vq_model: VQModel | str | os.PathLike[str],
        text_encoder: Any = None,
        tokenizer: Any = None,
        grid_size: int | None = None,
        num_heads: int | None = None,
        **settings: Any,
    ) -> Self:
        """Build a pipeline from published files.

        Args:
            path: the transformer's checkpoint, such as `c2i_XL_384.pt`.
            vq_model: the image tokenizer, or its file, such as `vq_ds16_c2i.pt`.
            text_encoder, tokenizer: for text-conditional models, e.g. Flan-T5-XL from transformers.
            grid_size, num_heads: facts that neither file nor file name tell; see
                `LlamaGenTransformer.from_original`.
            settings: `class_names`, `guidance_scale`, `top_k`, `temperature`; `dtype`, `device_map`.

        Raises:
            CheckpointError: a file that is missing, damaged, unsafe or of another model.
            InputError: components that do not fit each other, an unknown option.
        """
        transformer = LlamaGenTransformer.from_original(path, grid_size=grid_size, num_heads=num_heads)
        image_tokenizer = vq_model if isinstance(vq_model, VQModel) else VQModel.from_original(vq_model)
        components = {
            "transformer": transformer,
            "vq_model": image_tokenizer,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        return cls._of_single_files(components, settings)
