"""Which tokens of a scale matter more than others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Criterion = Literal["distance", "attention"]
"""What tokens are chosen by: their distance from the mean, or the attention that they are given."""


def squared_distances(x: Tensor) -> Tensor:
    """Squared distance of each token of x [R, L, C] from the mean of its row, [R, L] float32.

    The mean is what a scale says at frequency zero, so that tokens far from it carry its details (FastVAR, arXiv
    2503.23367, section 3).
    """
    x = x.float()
    return (x - x.mean(1, keepdim=True)).square().sum(-1)


def farthest(x: Tensor, ranges: Sequence[slice]) -> Tensor:
    """`squared_distances` within ranges of the tokens of x [R, L, C]; 0 outside of them."""
    scores = x.new_zeros(x.shape[:2], dtype=torch.float32)
    for part in ranges:
        scores[:, part] = squared_distances(x[:, part])
    return scores


def highest(scores: Tensor, count: int) -> Tensor:
    """The `count` tokens of each row with the highest scores [R, L], by descending score: [R, count]; of equal ones
    the first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


class ReceivedAttention:
    """Notes how much attention the tokens of a scale get from each other.

    The score of a token is the mean, over heads and queries, of the probability with which the scale's queries attend
    to its key; keys of scales before do not count. This is one more product of queries and keys than the pass needs, so
    it is meant for few scales.

    Attributes:
        scores: by layer, [R, P] float32.
    """

    def __init__(self) -> None:
        self.scores: dict[int, Tensor] = {}

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, scale: float) -> None:
        """Take in the new queries and keys [R, H, P, D] of a layer; their products count `scale` times."""
        heads = queries.shape[1]
        total = queries.new_zeros(queries.shape[0], queries.shape[2], dtype=torch.float32)
        for head in range(
            heads
        ):  # one after the other: all maps together would be the largest tensor of the call
            products = (queries[:, head] @ keys[:, head].mT).float() * scale
            total += products.softmax(-1).mean(1)
        self.scores[layer] = total / heads
