"""Masked orders: random positions in groups that grow like a cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.options import positive_integer
from varaccel.errors import InputError


@dataclass(frozen=True)
class MaskedInputs:
    """One iteration.

    Attributes:
        positions: [B, P] decided in it, -1 is padding.
        known: [B, K] decided before it, -1 is padding, at the end of a row.
        remaining: positions that are still empty after it, of every image; one number if all are alike.
        number: of the iteration, from 0; the smallest if images differ.
        padded: whether there is any padding.
    """

    positions: Tensor
    known: Tensor
    remaining: int | Tensor
    number: int
    padded: bool = False

    def share(self, total: int) -> float | Tensor:
        """How much of the image is decided after the iteration, 0 to 1; [B, 1] if images differ."""
        if isinstance(self.remaining, int):
            return (total - self.remaining) / total
        return ((total - self.remaining) / total).unsqueeze(1)


def cosine_borders(tokens: int, iterations: int) -> list[int]:
    """How many tokens are empty before iteration 0, 1, ... and after the last: `iterations` + 1 numbers.

    floor(N cos(pi/2 (s + 1)/S)) after iteration s, but at least one token is decided in each, and the last decides
    all that is left (MAR, arXiv 2406.11838, section 3.4, from MaskGIT).

    Raises:
        InputError: no iterations, or more than tokens.
    """
    positive_integer("num_iterations", iterations)
    if iterations > tokens:
        raise InputError(
            f"num_iterations must be at most the model's {tokens} tokens, got {iterations}; one token per iteration "
            "is the most that can be."
        )
    borders = [tokens]
    for step in range(1, iterations):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * step / iterations))
        borders.append(max(1, min(borders[-1] - 1, wanted)))
    return [*borders, 0]


@dataclass(frozen=True)
class CosineGroups:
    """Every image's own random order, in groups of equal size for all images.

    Attributes:
        permutation: [B, N] int64; the last entries are decided first, as published.
        iterations: number of groups S.

    Raises:
        InputError: no iterations, or more than tokens.
    """

    permutation: Tensor
    iterations: int

    def __post_init__(self) -> None:
        _ = self.borders  # refuses what cannot be

    @cached_property
    def borders(self) -> list[int]:
        """See `cosine_borders`."""
        return cosine_borders(self.permutation.shape[1], self.iterations)

    @property
    def widest(self) -> int:
        """The most tokens that any iteration decides."""
        return max(before - after for before, after in pairwise(self.borders))

    def step_inputs(self, canvas: Canvas) -> list[MaskedInputs]:
        borders = self.borders
        order = self.permutation.to(canvas.written.device)
        return [self._inputs(order, borders, step) for step in range(self.iterations)]

    @staticmethod
    def _inputs(order: Tensor, borders: Sequence[int], step: int) -> MaskedInputs:
        before, after = borders[step], borders[step + 1]
        # published guidance counts the token that the last iteration but one leaves
        remaining = max(1, after)
        return MaskedInputs(order[:, after:before], order[:, before:], remaining, step)

    def ragged(self, steps: Sequence[int], device: torch.device) -> MaskedInputs:
        """The iteration `steps[b]` of every image b; one that is past the end decides nothing.

        Args:
            device: of the result.
        """
        borders = [*self.borders, 0]  # one iteration past the end, which decides nothing
        starts = [borders[min(s, self.iterations)] for s in steps]
        stops = [borders[min(s, self.iterations) + 1] for s in steps]
        before, after = (torch.tensor(b, device=device).unsqueeze(1) for b in (starts, stops))
        order = self.permutation.to(device)
        most = max(start - stop for start, stop in zip(starts, stops, strict=True))
        known = order.shape[1] - min(starts)
        # the order from its end: what is known first
        known_index = order.shape[1] - 1 - torch.arange(known, device=device)
        asked_index = before - 1 - torch.arange(max(1, most), device=device)
        place = order.gather(1, asked_index.clamp(min=0))
        return MaskedInputs(
            torch.where(asked_index >= after, place, -1),
            torch.where(known_index >= before, order[:, known_index], -1),
            after.squeeze(1).clamp(min=1),
            min(steps),
            padded=True,
        )
