"""What a next-scale network must be able to do to be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from varaccel.engine.network import Network
from varaccel.models.next_scale import Places
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.residual import Residual, add
from varaccel.nn.scale_schedule import ScaleSchedule


class ConditionRows(Protocol):
    """What follows from the conditions of a call alone, worked out once: R rows.

    Attributes:
        start: [R, 1, C], what the first token holds.
        head: [2, R, 1, C], scale and shift before the output layer.
        blocks: of every block, whatever it reads.
    """

    @property
    def rows(self) -> int: ...
    @property
    def start(self) -> Tensor: ...
    @property
    def head(self) -> Tensor: ...
    @property
    def blocks(self) -> Sequence[Any]: ...

    def part(self, rows: slice | Tensor) -> Self:
        """Of some rows, or of those of the numbers [n]."""
        ...


class NextScaleNetwork(Network, Protocol):
    """A transformer that decides whole scales, such as `VARTransformer`."""

    def condition_rows(self, condition: Condition | None, batch: int, guided: bool) -> ConditionRows:
        """Rows of B images, and below them, if guided, as many without their condition."""
        ...

    def places(self, schedule: ScaleSchedule) -> Places:
        """What the network is told of the places of all tokens."""
        ...

    def embed(self, start: Tensor | None, seen: Tensor, positions: Tensor) -> Tensor:
        """Inputs of tokens [R, P, C] from what they see [R, P, D], or P - 1 of them after a start."""
        ...

    def transform(
        self,
        x: Tensor,
        modulation: Sequence[Any],
        attention: AttentionInputs,
        tail: int | None = None,
        residual: Residual = add,
    ) -> Tensor:
        """Run the blocks on embedded inputs [R, P, C]; of the last `tail` tokens."""
        ...

    def head_nm(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Norm and modulation before the output layer."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """[R, P, C] -> float32 [R, P, V]."""
        ...

    def new_cache(self, batch: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of `slots` tokens."""
        ...
