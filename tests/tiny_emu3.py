"""A tiny random Emu3 and its processor, made offline."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig

from tests.tiny_transformers import liven, word_tokenizer

SPECIALS = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
    "eol_token": "<|extra_200|>",
}


@cache
def emu3_processor() -> Any:
    from transformers import Emu3ImageProcessor, Emu3Processor

    tokenizer = word_tokenizer(SPECIALS, ("*", *"0123456789"), bos=False, digits=True)
    return Emu3Processor(
        Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=64, max_pixels=4096),
        tokenizer,
    )


def emu3(
    codes: int = 60,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    *,
    scattered: bool = False,
    **text: Any,
) -> Any:
    """An Emu3 of 4 × 4 pixels per token.

    Args:
        scattered: image tokens stand in any order among those of text, not one after the other as in published ones.
    """
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3TextConfig, Emu3VQVAEConfig

    tokenizer = emu3_processor().tokenizer
    first = len(tokenizer)
    ids = list(range(first, first + codes))
    if scattered:
        random.Random(0).shuffle(ids)
    vocabulary = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS.values()}
    vocabulary |= {f"<|visual token {code:06d}|>": number for code, number in enumerate(ids)}
    config = Emu3Config(
        text_config=Emu3TextConfig(
            vocab_size=first + codes,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attention_dropout=0.0,
            **text,
        ),
        vq_config=Emu3VQVAEConfig(
            codebook_size=codes,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            hidden_size=32,
            temporal_downsample_factor=2,
            attn_resolutions=[2],
        ),
        vocabulary_map=vocabulary,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = liven(Emu3ForConditionalGeneration(config), seed)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=2)
    return model
