"""Tiny random models of transformers with image tokens, and processors for them, all made offline."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

WORDS = ("a", "red", "blue", "sphere", "cube", "left", "of", "and", "green", "cone")


def liven(model: Any, seed: int = 0, sharpness: float = 1.4) -> Any:
    """Weights whose greedy images are not one token over and over."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1.0, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, sharpness / module.in_features**0.5, generator=generator)
    return model.eval()


def word_tokenizer(
    specials: dict[str, str], first: tuple[str, ...] = (), *, bos: bool = True, digits: bool = False
) -> Any:
    """A tokenizer of whole words: <pad> 0, <s> 1, </s> 2, then `first` and the special tokens, then words.

    Args:
        specials: attributes of the tokenizer, such as {"boi_token": "<begin>"}.
        first: further tokens before the words.
        bos: begin every text with <s>.
        digits: read numbers digit by digit.
    """
    names = ["<pad>", "<s>", "</s>", *dict.fromkeys((*first, *specials.values())), "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
        )
        if digits
        else pre_tokenizers.WhitespaceSplit()
    )
    tokenizer.add_special_tokens([name for name in names if name.startswith("<")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", names.index("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=specials,
    )


JANUS_SPECIALS = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}


@cache
def janus_processor() -> Any:
    from transformers import JanusImageProcessor, JanusProcessor

    return JanusProcessor(JanusImageProcessor(), word_tokenizer(JANUS_SPECIALS))


def janus(
    grid: int = 4,
    codes: int = 24,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    **text: Any,
) -> Any:
    """A Janus of 16 pixels per token that draws `grid` × `grid` tokens."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig

    tokenizer = janus_processor().tokenizer
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **text,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=grid * 16,
            patch_size=16,
            projection_dim=hidden,
            num_image_tokens=grid * grid,
            depth=1,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            projection_dim=hidden,
            image_token_embed_dim=hidden,
            num_hidden_layers=2,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(JANUS_SPECIALS["image_token"]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = liven(JanusForConditionalGeneration(config), seed)
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        pad_token_id=0,
        eos_token_id=2,
        guidance_scale=5.0,
        # its loop computes with both, which transformers 5.0 leaves empty
        num_return_sequences=1,
        max_length=20,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(JANUS_SPECIALS["boi_token"])},
    )
    return model
