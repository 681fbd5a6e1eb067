"""The published Janus loop, rewritten without any of this library's optimisations: what its engine is compared with.

Conditional and unconditional rows alternate, keys and values grow by concatenation, and every pass computes both rows
of every image. The decoder is that of `JanusForConditionalGeneration` in transformers, as is its attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from varaccel.models.transformers_host.host import cache_argument


@torch.inference_mode()
def published_loop(
    model: Any,
    prompts: Tensor,
    *,
    cfg: float,
    temperature: float = 1.0,
    tokens: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw token ids as the published code does.

    Args:
        model: a `JanusForConditionalGeneration`.
        prompts: token ids [B, T] without padding, from the first token of a text to the one that begins an image; the
            published code has one prompt for all images.
        cfg: guidance; both rows are computed even if it is 1.
        temperature: 0 takes the most likely token, which the published code cannot.
        tokens: how many to draw, the whole image if None.
        generator: of all draws.

    Returns:
        token ids [B, `tokens`].
    """
    decoder = model.model.language_model
    rows = prompts.repeat_interleave(2, 0)
    rows[1::2, 1:-1] = model.generation_config.pad_token_id
    x = decoder.get_input_embeddings()(rows)
    count = model.model.vqmodel.config.num_patches**2 if tokens is None else tokens
    drawn = torch.zeros(len(prompts), count, dtype=torch.int32, device=x.device)
    past: dict[str, Any] = {cache_argument(decoder): DynamicCache(config=decoder.config)}
    for step in range(count):
        features = decoder(inputs_embeds=x, use_cache=True, **past).last_hidden_state
        logits = model.model.generation_head(features[:, -1])
        conditional, unconditional = logits[0::2], logits[1::2]
        logits = unconditional + cfg * (conditional - unconditional)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        drawn[:, step] = token.squeeze(-1)
        both = torch.cat([token.unsqueeze(1), token.unsqueeze(1)], 1).view(-1)
        x = model.prepare_embeddings_for_image_generation(both).unsqueeze(1)
    return drawn
