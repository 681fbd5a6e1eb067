"""One pass of a causal network over whole images whose tokens are known."""

from __future__ import annotations

import torch
from torch import Tensor

from varaccel.hosts.causal.network import CausalNetwork
from varaccel.nn.attention_inputs import AttentionInputs, prefix_mask
from varaccel.nn.prefix import Prefix


def teacher_forced(
    network: CausalNetwork, prefix: Prefix, token_ids: Tensor
) -> tuple[Tensor, AttentionInputs]:
    """Inputs of a pass over a condition and all tokens of an image but the last, which nothing follows.

    Args:
        prefix: of R rows and T slots.
        token_ids: [B, N] int64; R is B, or a multiple where every image is read under several conditions.

    Returns:
        embedded inputs [R, T + N - 1, D] and what attention needs for them; features of entry T - 1 + n predict
        token n.
    """
    embeddings, device = prefix.embeddings, token_ids.device
    read = token_ids[:, :-1]
    positions = torch.arange(read.shape[1], device=device).expand_as(read)
    image = network.embed_tokens(read, positions)
    x = torch.cat([embeddings, image.repeat(len(embeddings) // len(token_ids), 1, 1)], dim=1)
    length = x.shape[1]
    positional, modulation = prefix.positional, prefix.modulation
    if modulation is not None and modulation.shape[1] > 1:
        modulation = modulation[:, :length]
    return x, AttentionInputs(
        None if positional is None else positional[:, :length].to(device),
        modulation,
        mask=None if prefix.mask is None else prefix_mask(prefix.mask, length),
        causal=prefix.mask is None,
    )
