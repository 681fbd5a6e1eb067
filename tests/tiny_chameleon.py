"""A tiny random Chameleon and its processor, made offline."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig

from tests.tiny_transformers import liven, word_tokenizer

SPECIALS = {
    "image_token": "<image>",
    "boi_token": "<racm3:break>",
    "eoi_token": "<eoss>",
    "sep_token": "<reserved08706>",
}


@cache
def chameleon_processor() -> Any:
    from transformers import ChameleonImageProcessor, ChameleonProcessor

    tokenizer = word_tokenizer(
        {name: token for name, token in SPECIALS.items() if name != "sep_token"}, ("<reserved08706>",)
    )
    tokenizer.sep_token = SPECIALS["sep_token"]
    return ChameleonProcessor(ChameleonImageProcessor(), tokenizer, image_seq_length=16)


def chameleon(
    grid: int = 4,
    codes: int = 40,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    *,
    scattered: bool = False,
    **text: Any,
) -> Any:
    """A Chameleon of 4 × 4 pixels per token.

    Args:
        scattered: image tokens stand in any order among those of text.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

    tokenizer = chameleon_processor().tokenizer
    first = len(tokenizer)
    ids = list(range(first, first + codes))
    if scattered:
        random.Random(0).shuffle(ids)
    vocabulary = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS.values()}
    letters = {str(digit): chr(ord("A") + digit) for digit in range(10)}
    for code, number in enumerate(ids):
        vocabulary["IMGIMG" + "".join(letters[digit] for digit in str(code)) + "Z"] = number
    config = ChameleonConfig(
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
        vocabulary_map=vocabulary,
        vq_config=ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            latent_channels=16,
            resolution=4 * grid,
            base_channels=32,
            channel_multiplier=[1, 1, 2],
            num_res_blocks=1,
        ).to_dict(),
        **text,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = liven(ChameleonForConditionalGeneration(config), seed)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=2)
    return model
