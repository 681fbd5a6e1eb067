"""Image tokens of a model that keeps them among those of its text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.nn.devices import HOST

_MOST_RUNS = 4
"""Heads are read in so many pieces without being copied; each costs a matrix product."""


class ImageVocabulary:
    """Which ids of a text vocabulary the image token ids 0 to V - 1 are, and the part of a head that predicts them.

    A head over text and images has several times the rows that an image needs. The rows of consecutive ids are a view
    of it. Only if they are scattered, they are copied, and copied again when the weights have changed.

    Args:
        text_ids: V ids of the text vocabulary, by image token id.
    """

    def __init__(self, text_ids: Sequence[int]) -> None:
        self._ids = tuple(text_ids)
        self._runs = _runs(self._ids)
        self._tables: dict[torch.device, Tensor] = {}
        self._copy: tuple[nn.Parameter, tuple[object, ...], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def text_ids(self, tokens: Tensor) -> Tensor:
        """Image token ids [...] -> ids of the text vocabulary [...]."""
        return self._table(tokens.device)[tokens]

    def logits(self, head: nn.Module, features: Tensor) -> Tensor:
        """Features [..., D] -> logits [..., V] over image token ids.

        Args:
            head: predicts the text vocabulary. One that is no ordinary linear layer in memory (quantised, offloaded,
                split over devices, adapted) runs whole.
        """
        weight = _plain_weight(head)
        if weight is None:
            whole: Tensor = head(features)
            return whole[..., self._table(whole.device)]
        if len(self._runs) > _MOST_RUNS:
            return F.linear(features, self._rows(weight))
        parts = [F.linear(features, weight[first : first + length]) for first, length in self._runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _table(self, device: torch.device) -> Tensor:
        table = self._tables.get(device)
        if table is None:
            with torch.inference_mode(False):  # outlives the call, which may run in that mode
                table = torch.tensor(self._ids, device=HOST).to(device)
            self._tables[device] = table
        return table

    def _rows(self, weight: nn.Parameter) -> Tensor:
        """The rows [V, D] of a head, copied once."""
        if torch.is_grad_enabled() or weight.is_inference():  # a copy would learn nothing, or has no version
            return weight[self._table(weight.device)]
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        copy = self._copy
        if copy is None or copy[0] is not weight or copy[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                copy = (weight, state, weight[self._table(weight.device)])
            self._copy = copy
        return copy[2]


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """(first, length) of the stretches of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in ids:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _plain_weight(head: nn.Module) -> nn.Parameter | None:
    """The weight [text vocabulary, D] of a head that does nothing but multiply with it; None for others."""
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return None
    weight = head.weight
    if head._forward_hooks or head._forward_pre_hooks or type(weight) is not nn.Parameter:
        return None
    ordinary = weight.is_floating_point() and not weight.is_meta and not hasattr(weight, "full_tensor")
    return weight if ordinary and weight.shape == (head.out_features, head.in_features) else None
