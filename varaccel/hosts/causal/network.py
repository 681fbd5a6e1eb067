"""What the engine asks of a network that decides one token after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from varaccel.engine.network import Network
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.prefix import Prefix


class CausalNetwork(Network, Protocol):
    """A causal token network: a prefix that carries the condition, then image tokens.

    The network holds weights only. `varaccel.nn.prefix.PrefixConditioned` has defaults for what most networks do
    alike.
    """

    def encode_condition(self, condition: Condition, grids: Sequence[Grid], *, guided: bool) -> Prefix:
        """The condition of B images for an image of these grids, as R = B rows; while guided as R = G * B, of its G
        branches one after the other (`Condition.branches`)."""
        ...

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Inputs [B, P, D] for image tokens [B, P] that stand at `positions` [B, P] (-1 is padding)."""
        ...

    def transform(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        """Run the layers and the final norm: inputs [R, P, D] -> features [R, P, D]."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """Features [R, P, D] -> float32 logits [R, P, V] of the token that follows each."""
        ...

    def possible_tokens(self, positions: Tensor, grids: Sequence[Grid]) -> Tensor | None:
        """Which tokens may stand at `positions` ([P] or [B, P]): bool [..., V]; None if all may everywhere."""
        ...

    def new_cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache of `rows` rows and `slots` slots."""
        ...


@runtime_checkable
class LayeredNetwork(CausalNetwork, Protocol):
    """A causal network that can be run with some of its layers only."""

    @property
    def num_layers(self) -> int: ...

    def transform(self, x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None) -> Tensor:
        """Run the layers with these numbers; the i-th of them uses layer i of the cache."""
        ...

    def new_cache(self, rows: int, slots: int, layers: Sequence[int] | None = None) -> KVCache:
        """An empty cache for the layers with these numbers, all if None."""
        ...
