"""Attention of several queries over grouped keys and values, without copies of them.

The `sdpa` function of transformers repeats keys and values for every query head where a mask meets more than one query:
with 2 KV heads for 32 (GLM-Image) it writes 16 copies of the cache in every layer of a pass over draft tokens. Query
heads of a group can stand beside each other as further queries instead, which every kernel takes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

GROUPED = "varaccel_grouped"
"""Name of the function in transformers' table of attention implementations."""


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Query [R, H, P, D] over keys and values [R, H / G, K, D], under a mask [R, 1, P, K] -> [R, P, H, D]."""
    groups = query.shape[1] // key.shape[1]
    rows, _heads, count, width = query.shape
    packed = query.reshape(rows, key.shape[1], groups * count, width)
    mask = attention_mask if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
    mixed = F.scaled_dot_product_attention(packed, key, value, mask, dropout, scale=scaling)
    return mixed.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register(GROUPED, grouped_attention)


def has_groups(layer: Any) -> bool:
    """Whether a layer's heads share keys and values, and its attention function can be exchanged for this one."""
    attention = getattr(layer, "self_attn", None)
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    return implementation == "sdpa" and getattr(attention, "num_key_value_groups", 1) > 1
