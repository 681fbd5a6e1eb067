"""A tiny random GLM-Image: the model of transformers and the decoder of diffusers, all made offline."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, GenerationConfig, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.tiny_transformers import WORDS, liven

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
NUMBERS = tuple(str(number) for number in range(1, 20))


def word_tokenizer(codes: int) -> Any:
    """Whole words behind the image tokens, the start and the end of an image."""
    specials = ["<begin>", "<end>", "<grid>", "</grid>", "<image>", "<unk>", "<pad>"]
    names = [*(f"<code {i}>" for i in range(codes)), *specials, *WORDS, *NUMBERS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "grid_bos_token": "<grid>",
            "grid_eos_token": "</grid>",
        },
    )


@cache
def processor(codes: int = 24, preview: int = 1) -> Any:
    """A processor whose preview grids have 1 / `preview` of the published sides."""
    from transformers import GlmImageImageProcessor, GlmImageProcessor

    class Processor(GlmImageProcessor):
        def _get_target_shape(self, height: int, width: int) -> Any:
            rows, columns, *small = super()._get_target_shape(height, width)
            return (rows, columns, *(max(1, side // preview) for side in small))

        def _build_prompt_with_target_shape(self, *given: Any, **named: Any) -> Any:
            text, *sizes = super()._build_prompt_with_target_shape(*given, **named)
            if hasattr(GlmImageProcessor, "_get_target_shape"):
                return (text, *sizes)
            # older versions compute the sizes here
            small = [max(1, side // preview) for side in sizes[2:]]
            before, after = text.rsplit(f"{sizes[2]} {sizes[3]}", 1)
            return (f"{before}{small[0]} {small[1]}{after}", *sizes[:2], *small)

    chosen = GlmImageProcessor if preview == 1 else Processor
    return chosen(GlmImageImageProcessor(), word_tokenizer(codes), chat_template=TEMPLATE)


def glm_image(
    codes: int = 24,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    **text: Any,
) -> Any:
    from transformers import (
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageTextConfig,
        GlmImageVisionConfig,
        GlmImageVQVAEConfig,
    )

    tokenizer = processor(codes).tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<begin>", "<end>", "<image>", "<pad>")}
    half = hidden // heads // 2
    config = GlmImageConfig(
        text_config=GlmImageTextConfig(
            vocab_size=len(tokenizer),
            vision_vocab_size=codes + 4,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=2048,
            pad_token_id=ids["<pad>"],
            eos_token_id=ids["<end>"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
                "partial_rotary_factor": 1.0,
            },
            **text,
        ),
        vision_config=GlmImageVisionConfig(
            depth=1, hidden_size=32, num_heads=2, intermediate_size=64, image_size=64, patch_size=16
        ),
        vq_config=GlmImageVQVAEConfig(embed_dim=16, num_embeddings=codes, latent_channels=32),
        image_token_id=ids["<image>"],
        image_start_token_id=ids["<begin>"],
        image_end_token_id=ids["<end>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = liven(GlmImageForConditionalGeneration(config), seed)
    model.generation_config = GenerationConfig(eos_token_id=ids["<end>"], pad_token_id=ids["<pad>"])
    return model


def decoder(codes: int = 24, seed: int = 0) -> dict[str, Any]:
    """Text encoder, its tokenizer, diffusion transformer, VAE and scheduler."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel

    tokenizer = ByT5Tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        )
        dit = GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=codes,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.0, 0.8, 1.2, 1.0],
        )
    return {
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "dit": dit.eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
