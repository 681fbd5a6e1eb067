"""Pipelines of published sizes with random weights: time does not depend on what the weights are.

Networks are made on their device in their number type, tensor by tensor, so that the most memory is that of the model.
Image tokenizers and vision towers, which are not timed, are small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import (
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageTextConfig,
    GlmImageVisionConfig,
    GlmImageVQVAEConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from varaccel.evaluation.speed.size_catalog import Size
from varaccel.models.infinity import InfinityTransformer
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.models.mar import MARTransformer
from varaccel.models.var import VARTransformer
from varaccel.nn.aspect_schedules import infinity_schedule
from varaccel.nn.devices import Device
from varaccel.nn.grid import Grid
from varaccel.pipelines.glm_image import GlmImagePipeline
from varaccel.pipelines.infinity import InfinityPipeline
from varaccel.pipelines.janus import JanusPipeline
from varaccel.pipelines.llamagen import LlamaGenPipeline
from varaccel.pipelines.mar import MARPipeline
from varaccel.pipelines.var import VARPipeline
from varaccel.tokenizers.bitwise_vq import BitwiseVQModel
from varaccel.tokenizers.kl import kl_config
from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer
from varaccel.tokenizers.vq import VQModel

JANUS: Mapping[str, Mapping[str, int]] = {
    "Pro-1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "heads": 16},
    "Pro-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "heads": 32},
}
"""The decoders of the published sizes (Janus-Pro, arXiv 2501.17811); heads share no keys."""

JANUS_GRID = 24
PROMPT_LENGTH = 32
"""Tokens of a prompt, template included."""


_WORD = "image"


class _NoProcessor:
    """What stands in for a processor: every prompt is the same token ids."""

    _every_prompt: Sequence[int]

    @classmethod
    def _check_processor(cls, processor: Any) -> None:
        """There is none."""

    def _prompt_ids(self, prompt: str, size: tuple[int, int] | None) -> Sequence[int]:
        return self._every_prompt

    def _pad_token(self) -> int:
        return 0


class _Janus(_NoProcessor, JanusPipeline, abstract=True):
    # begins a text, words, begins an image
    _every_prompt = [1, *range(3, PROMPT_LENGTH + 1), 2]  # noqa: RUF012


class _GlmImage(_NoProcessor, GlmImagePipeline, abstract=True):
    _every_prompt = [1, *range(3, PROMPT_LENGTH + 1), 2]  # noqa: RUF012

    def _grids_of(self, size: tuple[int, int]) -> tuple[Grid, ...]:
        # the preview has half of the sides at 1024 pixels
        side = size[0] // self.vq_model.downsample_factor
        return Grid(side // 2, side // 2), Grid(side, side)


def random_pipeline(size: Size, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of a size with random weights, and prompts of it work as of any other; see `random_prompts`."""
    makers: dict[str, Callable[[Size, torch.device, torch.dtype], Any]] = {
        "llamagen": _llamagen,
        "var": _var,
        "infinity": _infinity,
        "mar": _mar,
        "janus": _janus,
        "glm_image": _glm_image,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = makers[size.family](size, torch.device(device), dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_prompts(size: Size, images: int) -> list[str | int]:
    """Prompts for as many images."""
    if size.family == "infinity":
        return [" ".join([_WORD] * (PROMPT_LENGTH - 1))] * images
    return [0 if size.family in ("llamagen", "var", "mar") else "an image"] * images


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Tensors of this block are born there."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def _llamagen(size: Size, device: torch.device, dtype: torch.dtype) -> LlamaGenPipeline:
    with _made_on(device, dtype):
        network = LlamaGenTransformer.from_preset(size.preset, **size.changes).eval()
    with _made_on(device, torch.float32):
        vq = VQModel(
            base_channels=32,
            channel_multipliers=(1, 1, 1, 1, 1),
            num_res_blocks=1,
            codebook_size=network.config.vocab_size,
        ).eval()
    return LlamaGenPipeline(network, vq)


def _var(size: Size, device: torch.device, dtype: torch.dtype) -> VARPipeline:
    with _made_on(device, dtype):
        network = VARTransformer.from_preset(size.preset, **size.changes).eval()
        refiner = None
        if size.refiner is not None:
            refiner = VARTransformer.from_preset(size.refiner, **size.changes).eval()
    with _made_on(device, torch.float32):
        vq = MultiScaleVQModel(
            base_channels=32, scales=network.schedule.sides, codebook_size=network.config.vocab_size
        ).eval()
    return VARPipeline(network, vq, refiner=refiner)


def _infinity(size: Size, device: torch.device, dtype: torch.dtype) -> InfinityPipeline:
    changes = {**size.changes}
    schedule = infinity_schedule("1.0", changes.pop("size"))
    with _made_on(device, dtype):
        network = InfinityTransformer.from_preset(size.preset, **changes).eval()
    words = WordTokenizer.from_words([_WORD], max_length=PROMPT_LENGTH)
    with _made_on(device, torch.float32):
        vq = BitwiseVQModel(
            base_channels=48,
            channel_multipliers=(1, 1, 1, 1, 1),
            num_res_blocks=1,
            bits=network.config.token_bits,
        ).eval()
        encoder = WordTextEncoder(
            len(words),
            dim=network.config.text_dim,
            num_layers=1,
            num_heads=2,
            ffn_dim=32,
            max_length=PROMPT_LENGTH,
        ).eval()
    height, width = vq.image_size(schedule)
    return InfinityPipeline(network, vq, encoder, words, height=height, width=width)


def _mar(size: Size, device: torch.device, dtype: torch.dtype) -> MARPipeline:
    with _made_on(device, dtype):
        network = MARTransformer.from_preset(size.preset, **size.changes).eval()
    with _made_on(device, torch.float32):
        sizes = kl_config((8,) * 5, network.channels, layers_per_block=1, norm_num_groups=4)
        vae = AutoencoderKL(**sizes).eval()
    return MARPipeline(network, vae)


def _janus(size: Size, device: torch.device, dtype: torch.dtype) -> JanusPipeline:
    text: dict[str, Any] = {**JANUS[size.preset], "vocab_size": 102400, "codes": 16384, "grid": JANUS_GRID}
    text |= size.changes
    heads, grid, codes = text.pop("heads"), text.pop("grid"), text.pop("codes")
    width = text["hidden_size"]
    config = JanusConfig(
        text_config=LlamaConfig(
            **text,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=16384,
            pad_token_id=0,
            bos_token_id=1,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16 * grid,
            patch_size=16,
            projection_dim=width,
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
            projection_dim=width,
            image_token_embed_dim=width,
            num_hidden_layers=2,
        ),
        image_token_id=3,
    )
    with _made_on(device, dtype):
        model = JanusForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=1, pad_token_id=0, guidance_scale=5.0, generation_kwargs={"boi_token_id": 2}
    )
    return _Janus(model, None)


def _glm_image(size: Size, device: torch.device, dtype: torch.dtype) -> GlmImagePipeline:
    # what the classes of transformers have as defaults is the published size
    text = {"hidden_size": 4096, "num_attention_heads": 32, **size.changes}
    side = text.pop("side", 32)
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": sections,
        "partial_rotary_factor": 1.0,
    }
    codes = text.get("vision_vocab_size", 16512) - 128
    config = GlmImageConfig(
        text_config=GlmImageTextConfig(**{"rope_parameters": rope, **text}),
        vision_config=GlmImageVisionConfig(
            depth=1, hidden_size=32, num_heads=2, intermediate_size=64, image_size=64, patch_size=16
        ),
        vq_config=GlmImageVQVAEConfig(embed_dim=16, num_embeddings=codes, latent_channels=32),
    )
    with _made_on(device, dtype):
        model = GlmImageForConditionalGeneration(config).eval()
    pixels = 32 * side
    return _GlmImage(model, None, height=pixels, width=pixels)
