"""A tiny random ImageGPT and its image processor, made offline."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from tests.tiny_transformers import liven


@cache
def imagegpt_processor(colors: int = 20, side: int = 6) -> Any:
    from transformers import ImageGPTImageProcessor

    clusters = torch.rand(colors, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ImageGPTImageProcessor(clusters=clusters, size={"height": side, "width": side})


def imagegpt(
    side: int = 6,
    colors: int = 20,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    seed: int = 0,
    **more: Any,
) -> Any:
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    config = ImageGPTConfig(
        vocab_size=colors + 1, n_positions=side * side, n_embd=hidden, n_layer=layers, n_head=heads, **more
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = liven(ImageGPTForCausalImageModeling(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Conv1D):
                module.weight.normal_(0, 1.4 / module.weight.shape[0] ** 0.5, generator=generator)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model
