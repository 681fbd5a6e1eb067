"""A cache whose layers hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.hosts.next_scale.importance import farthest, highest
from varaccel.nn.kv_cache import KVCache


@dataclass(frozen=True)
class Budget:
    """How many keys of a scale stay.

    Attributes:
        start, stop: the scale's tokens among those of the pass.
        counts: keys that stay, of every layer.
    """

    start: int
    stop: int
    counts: tuple[int, ...]


class GrowingCache(KVCache):
    """Keys and values of each layer as long as what was stored there, for passes that store some tokens only.

    A pass sees all of its own keys; those that its budgets leave out are not kept for later ones. Which of them stay is
    decided per row: the keys farthest from their scale's mean key, or those with the highest scores. Memory grows with
    what is stored; while a layer grows its old keys exist twice.

    Attributes:
        budgets: of the scales of the pass that runs; all of a scale without one stays.
        scores: of the pass that runs, by layer: [R, P], how much each of its keys matters.
        peak_bytes: the most that was held at a time.
    """

    def __init__(self, layers: int, dtype: torch.dtype | None) -> None:
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._dtype = dtype
        self.budgets: Sequence[Budget] = ()
        self.scores: dict[int, Tensor] = {}
        self.peak_bytes = self._bytes = 0

    def length(self, layer: int) -> int:
        """Tokens that a layer holds of each row."""
        held = self._held[layer]
        return 0 if held is None else held[0].shape[2]

    @property
    def batch(self) -> int:
        return next((held[0].shape[0] for held in self._held if held is not None), 0)

    @property
    def slots(self) -> int:
        return max(map(self.length, range(len(self._held))))

    @property
    def nbytes(self) -> int:
        return self._bytes

    def update(
        self, layer: int, slots: Tensor, keys: Tensor, values: Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [R, H, P, D] behind those that are there, whatever slots are named."""
        seen = self.beside(layer, keys, values, 0)
        kept = self._kept(layer, keys)
        if kept is None:
            stored = seen
        else:
            index = kept[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            stored = self.beside(layer, keys.gather(2, index), values.gather(2, index), 0)
        dtype = self._dtype or keys.dtype
        self._hold(layer, (stored[0].to(dtype), stored[1].to(dtype)))
        return seen

    def beside(self, layer: int, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """All that a layer holds, followed by new keys and values [R, H, P, D]."""
        held = self._held[layer]
        if held is None:
            return keys, values
        return (
            torch.cat([held[0].to(keys.dtype), keys], 2),
            torch.cat([held[1].to(values.dtype), values], 2),
        )

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Only rows `rows` stay, in this order; the memory of the others is free."""
        if self.batch == 0:
            return
        device = next(held[0].device for held in self._held if held is not None)
        index = torch.tensor(rows, device=device)
        for layer, held in enumerate(self._held):
            if held is not None:
                self._hold(layer, (held[0][index], held[1][index]))

    def _hold(self, layer: int, pair: tuple[Tensor, Tensor]) -> None:
        old = self._held[layer]
        self._bytes += sum(part.nbytes for part in pair) - sum(part.nbytes for part in old or ())
        self._held[layer] = pair
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _kept(self, layer: int, keys: Tensor) -> Tensor | None:
        """The tokens of the pass that stay, [R, K] ascending; None for all."""
        if not self.budgets:
            return None
        parts, position = [], 0
        rows = keys.shape[0]
        scores = self.scores.get(layer)
        if scores is None:
            scores = farthest(keys.transpose(1, 2).flatten(2), self._ranges(keys.shape[2]))
        for budget in self.budgets:
            parts.append(_all(position, budget.start, rows, keys))
            stop = min(budget.stop, keys.shape[2])
            count = min(budget.counts[layer], stop - budget.start)
            kept = highest(scores[:, budget.start : stop], count)
            parts.append(kept.sort(dim=1).values + budget.start)
            position = stop
        parts.append(_all(position, keys.shape[2], rows, keys))
        return torch.cat(parts, 1)

    def _ranges(self, length: int) -> list[slice]:
        """The scales with budgets, whose keys are compared with each other."""
        return [slice(budget.start, min(budget.stop, length)) for budget in self.budgets]


def _all(start: int, stop: int, rows: int, like: Tensor) -> Tensor:
    return torch.arange(start, stop, device=like.device).expand(rows, -1)
