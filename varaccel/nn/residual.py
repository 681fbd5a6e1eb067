"""How what a sub-layer works out reaches the stream of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from varaccel.nn.attention_inputs import AttentionInputs

Part = Literal["attention", "cross", "ffn"]
"""A sub-layer: self-attention, cross-attention, feed-forward."""

Update = Callable[[Tensor, AttentionInputs], Tensor]
"""The stream [R, P, C] -> what the sub-layer adds to it, norm, modulation and gate included: [R, P, C]."""


class Residual(Protocol):
    """What a block does with each of its sub-layers: all work on the stream goes through here.

    A rule may run a sub-layer on some tokens only, or change the stream after it.
    """

    def __call__(
        self, x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Part
    ) -> Tensor:
        """The stream after a sub-layer.

        Args:
            x: [R, P, C], the stream before it.
            update: the sub-layer; what it is given of tokens must be what `attention` says of them.
            attention: of all tokens of the pass.
            layer: number of the block.
        """
        ...


def add(x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Part) -> Tensor:
    """Every token gets its update."""
    return x + update(x, attention)
