"""The engine's cache as decoders of transformers see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache

from varaccel.nn.kv_cache import KVCache


class SlotCache(Cache):
    """A transformers cache for one forward pass, which writes into the named slots instead of appending.

    Decoders ask a cache for two things only, as long as they are given position ids and a 4-D mask: to store new keys
    and values, and to return those that are attended to.

    Args:
        cache: keys and values of the call.
        slots: [P] or [R, P], where those of this pass go.
        length: number of leading slots that are attended to, None for all.
        ranks: layer of `cache` by the number that the decoder's layer has.
    """

    def __init__(self, cache: KVCache, slots: Tensor, length: int | None, ranks: Mapping[int, int]) -> None:
        super().__init__(layers=[])
        self._cache, self._length, self._ranks = cache, length, ranks
        self._slots = {slots.device: slots}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [R, H, P, D] of a layer; return those of the leading slots, [R, H, length, D]."""
        slots = self._slots.get(key_states.device)
        if slots is None:  # once per pass and device, and not in every layer
            slots = next(iter(self._slots.values())).to(key_states.device)
            self._slots[key_states.device] = slots
        return self._cache.update(self._ranks[layer_idx], slots, key_states, value_states, self._length)
