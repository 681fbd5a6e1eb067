"""Patch schedules of next-scale models: how many tokens each scale has, and which convolution follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from varaccel.errors import InputError

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
NO_TOKEN = -1
"""The token id of a place without a token, where a scale was left out: it adds nothing to the feature map."""

SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@dataclass(frozen=True)
class ScaleSchedule:
    """Token maps of a next-scale model, coarse to fine (VAR, arXiv 2404.02905, section 3.2).

    Tokens are numbered scale after scale, each in raster order.

    Attributes:
        grids: height and width of every scale, growing; a side p stands for (p, p).
        reference: the grid that places of all scales are told in, for models that know no other; the last one if None.

    Raises:
        InputError: no scale, a side below 1, or scales that do not grow.
    """

    grids: tuple[tuple[int, int], ...]
    reference: tuple[int, int] | None = None

    def __init__(
        self, grids: Sequence[int | Sequence[int]], reference: tuple[int, int] | None = None
    ) -> None:
        object.__setattr__(self, "grids", tuple(_grid(each, grids) for each in grids))
        object.__setattr__(self, "reference", None if reference is None else _grid(reference, [reference]))
        if not self.grids:
            raise InputError(
                "a scale schedule is one or more sides of at least 1, such as (1, 2, 4), got none."
            )
        for (h, w), (next_h, next_w) in pairwise(self.grids):
            if next_h < h or next_w < w or next_h * next_w == h * w:
                raise InputError(f"the scales of a schedule must increase, got {self.maps}.")

    def __len__(self) -> int:
        """Number of scales S."""
        return len(self.grids)

    @property
    def maps(self) -> list[int | tuple[int, int]]:
        """The grids as messages name them: squares by their side."""
        return [h if h == w else (h, w) for h, w in self.grids]

    @property
    def sides(self) -> tuple[int, ...]:
        """p_s of every scale.

        Raises:
            InputError: token maps that are no squares.
        """
        if any(h != w for h, w in self.grids):
            raise InputError(f"the token maps {self.maps} are no squares.")
        return tuple(h for h, _ in self.grids)

    @property
    def last_side(self) -> int:
        """Side n of the finest scale, which is that of the feature map."""
        return self.sides[-1]

    @property
    def last_grid(self) -> tuple[int, int]:
        """Height and width of the finest scale."""
        return self.grids[-1]

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """Tokens before each scale, and their number in all: S + 1 numbers from 0 to L."""
        return (0, *accumulate(h * w for h, w in self.grids))

    def scale_of_tokens(self) -> list[int]:
        """The scale that each of the L tokens belongs to."""
        return [scale for scale, (h, w) in enumerate(self.grids) for _ in range(h * w)]

    @property
    def num_tokens(self) -> int:
        """Number L of tokens of an image."""
        return self.borders[-1]

    def span(self, scale: int) -> slice:
        """The tokens of one scale."""
        return slice(self.borders[scale], self.borders[scale + 1])

    def progress(self, scale: int) -> float:
        """How far along a scale is: 0 for the first, 1 for the last (and for an only one)."""
        return scale / (len(self) - 1) if len(self) > 1 else 1.0

    def nearest(self, choices: Sequence[float]) -> tuple[int, ...]:
        """For every scale the index of the choice nearest to its progress; the first one wins an exact tie.

        In double precision, as NumPy computes it: the 10-scale schedules have scales exactly between two
        choices in real arithmetic, where rounding decides.
        """
        return tuple(
            min(range(len(choices)), key=lambda k: abs(choices[k] - self.progress(s)))
            for s in range(len(self))
        )


def _grid(given: object, of: object) -> tuple[int, int]:
    pair = (given, given) if not isinstance(given, (tuple, list)) else tuple(given)
    if len(pair) != 2 or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in pair):
        raise InputError(
            f"a scale schedule is one or more sides of at least 1, such as (1, 2, 4), or grids "
            f"(height, width), got {of}."
        )
    return pair


def shared_convolution_table(schedule: ScaleSchedule, convolutions: int) -> tuple[int, ...]:
    """Which of `convolutions` shared convolutions follows each scale (VAR's "partially shared" phi)."""
    import numpy as np

    edge = 1 / 3 / convolutions if convolutions == 4 else 1 / 2 / convolutions
    return schedule.nearest(np.linspace(edge, 1 - edge, convolutions).tolist())
