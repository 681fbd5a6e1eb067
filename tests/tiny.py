"""Tiny randomly initialised models for tests: real classes, sizes that decode in milliseconds."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from varaccel.models.eagle import EagleHead, Target
from varaccel.models.infinity import InfinityTransformer
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.models.mar import MARTransformer
from varaccel.models.var import VARTransformer
from varaccel.pipelines.base import TokenPipeline
from varaccel.pipelines.infinity import InfinityPipeline
from varaccel.pipelines.llamagen import LlamaGenPipeline
from varaccel.pipelines.mar import MARPipeline
from varaccel.pipelines.var import VARPipeline
from varaccel.tokenizers.bitwise_vq import BitwiseVQModel
from varaccel.tokenizers.kl import kl_config
from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer
from varaccel.tokenizers.vq import VQModel

GRID = 4
SCALES = (1, 2, 3)
VOCAB_SIZE = 24
WORDS = ("a", "red", "blue", "sphere", "cube", "left", "of")
CLASSES = ("tench, Tinca tinca", "goldfish", "hammerhead", "cock", "hen")


def transformer(model_type: str, seed: int = 0, **changes: object) -> LlamaGenTransformer:
    """A random model whose distributions are neither flat nor certain, so that sampling matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, object] = {
            "model_type": model_type,
            "dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB_SIZE,
            "grid_size": GRID,
            "num_classes": len(CLASSES),
            "prefix_length": 8,
            "caption_dim": 16,
            "ffn_multiple_of": 16,
        }
        model = LlamaGenTransformer(**{**sizes, **changes})
        with torch.no_grad():
            model.output.weight.mul_(4)
    return model.eval()


def vq_model(seed: int = 0, **changes: object) -> VQModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, object] = {
            "base_channels": 8,
            "channel_multipliers": (1, 2),
            "num_res_blocks": 1,
            "z_channels": 16,
            "codebook_size": VOCAB_SIZE,
            "codebook_dim": 4,
            "norm_groups": 4,
        }
        return VQModel(**{**sizes, **changes}).eval()


def text_encoder(tokenizer: WordTokenizer, seed: int = 0) -> WordTextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WordTextEncoder(
            len(tokenizer), dim=16, num_layers=1, num_heads=2, ffn_dim=32, max_length=8
        ).eval()


def new_pipeline(model_type: str) -> TokenPipeline:
    """A pipeline of its own, for tests that change it."""
    if model_type.startswith("var-"):
        pipe: TokenPipeline = new_var_pipeline(model_type.removeprefix("var-"))
    elif model_type.startswith("mar-"):
        pipe = new_mar_pipeline(model_type.removeprefix("mar-"))
    elif model_type == "infinity":
        pipe = new_infinity_pipeline()
    elif model_type == "c2i":
        pipe = LlamaGenPipeline(transformer("c2i"), vq_model(), class_names=CLASSES, guidance_scale=2.0)
    else:
        tokenizer = WordTokenizer.from_words(WORDS, max_length=8)
        pipe = LlamaGenPipeline(
            transformer("t2i"), vq_model(), text_encoder(tokenizer), tokenizer, guidance_scale=2.0
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def eagle_head(target: Target, seed: int = 0) -> EagleHead:
    """An untrained drafter: it knows nothing, but fits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EagleHead.for_target(target).eval()


@cache
def drafting_pipeline(
    model_type: str, vocab_size: int = VOCAB_SIZE, grid: int = GRID, sharpness: float = 1.0
) -> LlamaGenPipeline:
    """A pipeline with every drafter, shared by tests, which must not change it.

    Args:
        vocab_size, grid: small enough and all its images can be listed.
        sharpness: factor on the logits.

    Attention is made strong, so that every token matters for all that follow and not only for the next.
    """
    sizes = {"dim": 8, "num_layers": 3, "num_heads": 1, "vocab_size": vocab_size, "grid_size": grid}
    target, small = (transformer(model_type, seed, **sizes) for seed in (0, 1))
    with torch.no_grad():
        for layer in target.layers:
            layer.attention.wqkv.weight.mul_(2)
            layer.attention.wo.weight.mul_(8)
        target.output.weight.mul_(sharpness)
        # the drafter is a disturbed copy, so that some of its guesses hold and some do not
        for ours, theirs in zip(small.parameters(), target.parameters(), strict=True):
            ours.mul_(0.2).add_(theirs)
    words = None
    if model_type == "t2i":
        words = WordTokenizer.from_words(WORDS, max_length=8)
    pipe = LlamaGenPipeline(
        target,
        vq_model(codebook_size=vocab_size),
        None if words is None else text_encoder(words),
        words,
        class_names=CLASSES if model_type == "c2i" else None,
        guidance_scale=2.0,
        eagle_head=eagle_head(target),
        draft_transformer=small,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def pipeline(model_type: str) -> TokenPipeline:
    """A pipeline shared by tests, which must not change it."""
    return new_pipeline(model_type)


PROMPTS: dict[str, list[str | int]] = {
    "c2i": [0, "goldfish", 4],
    "t2i": ["a red sphere", "a blue cube left of a red sphere", "sphere"],
}
PROMPTS["infinity"] = PROMPTS["t2i"]
PROMPTS |= {f"{family}-class": PROMPTS["c2i"] for family in ("var", "mar")}
PROMPTS |= {f"{family}-caption": PROMPTS["t2i"] for family in ("var", "mar")}


def told(pipe: TokenPipeline, number: int) -> str | int:
    """Class `number` for a pipeline of classes, else a prompt in its place."""
    return number if pipe.family != "infinity" else str(PROMPTS["infinity"][number - 1])


def redraw(model: nn.Module, seed: int, std: float = 0.2) -> None:
    """Draw all parameters anew, biases, norms and gates included, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if name.endswith("scale_mul_1H11"):
                parameter.add_(math.log(4))
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def var_transformer(condition_type: str, seed: int = 0, **changes: object) -> VARTransformer:
    """A random next-scale model whose distributions are neither flat nor certain, so that sampling matters."""
    sizes: dict[str, object] = {
        "condition_type": condition_type,
        "depth": 3,
        "dim": 32,
        "num_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "codebook_dim": 4,
        "scales": SCALES,
        "num_classes": len(CLASSES),
        "caption_dim": 16,
    }
    model = VARTransformer(**{**sizes, **changes})
    redraw(model, seed)
    with torch.no_grad():
        model.head.weight.mul_(0.5)
    return model.eval()


def multiscale_vq(seed: int = 0, **changes: object) -> MultiScaleVQModel:
    sizes: dict[str, object] = {
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "codebook_size": VOCAB_SIZE,
        "codebook_dim": 4,
        "scales": SCALES,
        "norm_groups": 4,
    }
    model = MultiScaleVQModel(**{**sizes, **changes})
    redraw(model, seed)
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(5)
    return model.eval()


def new_var_pipeline(condition_type: str) -> VARPipeline:
    """A pipeline with a smaller model of other weights as its refiner."""
    words = WordTokenizer.from_words(WORDS, max_length=8) if condition_type == "caption" else None
    return VARPipeline(
        var_transformer(condition_type),
        multiscale_vq(),
        None if words is None else text_encoder(words),
        words,
        refiner=var_transformer(condition_type, seed=1, depth=2),
        class_names=CLASSES if condition_type == "class" else None,
        guidance_scale=3.0,
    )


def infinity_transformer(seed: int = 0, **changes: Any) -> InfinityTransformer:
    """A random model of four bits per token; the bits of most of its tokens are neither even nor certain."""
    sizes: dict[str, Any] = {
        "depth": 3,
        "dim": 32,
        "num_heads": 4,
        "token_bits": 4,
        "text_dim": 16,
        "text_tokens": 8,
        "pool_heads": 2,
        "ffn_dim": 64,
    }
    model = InfinityTransformer(**{**sizes, **changes})
    redraw(model, seed)
    with torch.no_grad():
        model.head.weight.mul_(0.5)
    return model.eval()


def bitwise_vq(seed: int = 0, **changes: Any) -> BitwiseVQModel:
    sizes: dict[str, Any] = {
        "base_channels": 24,
        "channel_multipliers": (1, 1),
        "num_res_blocks": 1,
        "bits": 4,
    }
    model = BitwiseVQModel(**{**sizes, **changes})
    redraw(model, seed, std=0.1)
    return model.eval()


def new_infinity_pipeline(**settings: Any) -> InfinityPipeline:
    """A pipeline with a smaller model of other weights as its refiner, and small scales of its own."""
    words = WordTokenizer.from_words(WORDS, max_length=8)
    return InfinityPipeline(
        infinity_transformer(),
        bitwise_vq(),
        text_encoder(words),
        words,
        refiner=infinity_transformer(seed=1, depth=2),
        **{"temperature": 1.0, "scales": SCALES, **settings},
    )


def mar_transformer(condition_type: str, seed: int = 0, **changes: object) -> MARTransformer:
    """A random masked model with a diffusion head; tokens are about as large as noise is."""
    sizes: dict[str, object] = {
        "condition_type": condition_type,
        "dim": 32,
        "encoder_depth": 1,
        "decoder_depth": 2,
        "num_heads": 4,
        "grid_size": GRID,
        "token_channels": 4,
        "buffer_size": 8,
        "num_classes": len(CLASSES),
        "caption_dim": 16,
        "head_depth": 2,
        "head_width": 32,
        "noise_schedule": "linear",
    }
    model = MARTransformer(**{**sizes, **changes})
    redraw(model, seed)
    head, channels = model.head, model.channels
    with torch.no_grad():
        # Steps multiply what a head gets wrong, so a random one must at least see that a noisy token is mostly noise:
        # a path for the token goes through, beside constants large enough that norms do not undo its size.
        first, last, width = head.input_proj, head.final_layer.linear, head.width
        half = (width - 2 * channels) // 2
        first.weight.mul_(0.2)
        first.bias[2 * channels :] = 8.0
        first.bias[2 * channels + half :] = -8.0
        last.weight.mul_(0.15)
        for block in head.res_blocks:
            block.mlp[2].weight.mul_(0.2)
        for parameter in head.final_layer.adaLN_modulation.parameters():
            parameter.mul_(0.02)
        for channel in range(channels):
            first.weight[channel, channel] += 1
            first.weight[channels + channel, channel] -= 1
            last.weight[channel, channel] += 3.5
            last.weight[channel, channels + channel] -= 3.5
    return model.eval()


def kl_vae(seed: int = 0, **changes: object) -> AutoencoderKL:
    """An image tokenizer of latents that are not scaled as they are."""
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 2 * GRID, "scaling_factor": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**{**kl_config((8, 8), 4, **sizes), **changes}).eval()


def mar_drafter(target: MARTransformer, seed: int = 1) -> MARTransformer:
    """A disturbed copy with one layer less, so that some of its tokens are kept and some are not."""
    small = mar_transformer(
        **{**sizes_of(target), "decoder_depth": target.config.decoder_depth - 1, "seed": seed}
    )
    theirs = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.mul_(0.1).add_(theirs[name], alpha=0.9)
    return small


def sizes_of(model: MARTransformer) -> dict[str, Any]:
    """What a model was made with."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def new_mar_pipeline(condition_type: str) -> MARPipeline:
    """A pipeline with a smaller model of other weights to draft with."""
    words = WordTokenizer.from_words(WORDS, max_length=8) if condition_type == "caption" else None
    network = mar_transformer(condition_type)
    return MARPipeline(
        network,
        kl_vae(),
        None if words is None else text_encoder(words),
        words,
        draft_transformer=mar_drafter(network),
        class_names=CLASSES if condition_type == "class" else None,
        guidance_scale=2.0,
        head_steps=8,
    )
