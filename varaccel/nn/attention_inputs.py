"""What a forward pass reads: positions, masks and the cache, as arguments of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.nn.kv_cache import KVCache


@dataclass(frozen=True)
class AttentionInputs:
    """What one forward pass reads and where it writes: everything about it that is not a weight.

    Attributes:
        positional: [P, ...], or [R, P, ...] with R = 1 or one list per row: what the network is told of the places of
            the inputs, rows of the table that it made itself (a rotary table, position ids of several axes, ...).
            None for networks that are told nothing.
        modulation: [R, 1, C] or [R, P, C]: what adaptive norms read; None for networks that have none.
        mask: bool, broadcastable to [B, H, P, K], True where a query may look; None means everything.
        causal: mask to be the lower triangle instead (a full pass without padding).
        cache: where keys and values are kept; None for a pass that needs no past.
        slots: [P] or [B, P] int64, cache slots of the inputs; None to look at the cache without storing them
            (networks with whole scales only).
        length: number of leading cache slots to attend over, None for all.
        observe: is shown the layer, its new queries and keys [R, H, P, D], and the factor of their products (networks
            with whole scales only).
    """

    positional: Tensor | None = None
    modulation: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    cache: KVCache | None = None
    slots: Tensor | None = None
    length: int | None = None
    observe: Callable[[int, Tensor, Tensor, float], None] | None = None


def prefix_mask(condition_mask: Tensor, length: int, start: int = 0) -> Tensor:
    """Who sees whom: causal, minus unused caption slots, plus the diagonal (a padded slot sees itself).

    Args:
        condition_mask: [B, T], nonzero where a caption slot is used.
        length: number of slots, condition included.
        start: first query slot.

    Returns:
        [B, 1, length - start, length] bool.
    """
    batch, prefix = condition_mask.shape
    device = condition_mask.device
    usable = torch.ones(batch, length, dtype=torch.bool, device=device)
    usable[:, : min(prefix, length)] = condition_mask[:, :length].bool()
    slots = torch.arange(length, device=device)
    causal = slots[start:, None] >= slots  # [Q, K]
    diagonal = slots[start:, None] == slots
    return ((causal & usable[:, None]) | diagonal).unsqueeze(1)
