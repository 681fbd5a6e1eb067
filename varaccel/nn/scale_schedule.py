"""Patch schedules of next-scale models: how many tokens each scale has, and which convolution follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from varaccel.errors import InputError

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@dataclass(frozen=True)
class ScaleSchedule:
    """Sides of the square token maps of a next-scale model, coarse to fine (VAR, arXiv 2404.02905, section 3.2).

    Tokens are numbered scale after scale, each in raster order.

    Attributes:
        sides: p_s of every scale, increasing.

    Raises:
        InputError: no scale, a side below 1, or sides that do not increase.
    """

    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(self.sides))
        if not self.sides or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in self.sides):
            raise InputError(
                f"a scale schedule is one or more sides of at least 1, such as (1, 2, 4), got {self.sides}."
            )
        if any(a >= b for a, b in zip(self.sides, self.sides[1:], strict=False)):
            raise InputError(f"the sides of a scale schedule must increase, got {self.sides}.")

    def __len__(self) -> int:
        """Number of scales S."""
        return len(self.sides)

    @property
    def last_side(self) -> int:
        """Side n of the finest scale, which is that of the feature map."""
        return self.sides[-1]

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """Tokens before each scale, and their number in all: S + 1 numbers from 0 to L."""
        borders = [0]
        for side in self.sides:
            borders.append(borders[-1] + side * side)
        return tuple(borders)

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


def shared_convolution_table(schedule: ScaleSchedule, convolutions: int) -> tuple[int, ...]:
    """Which of `convolutions` shared convolutions follows each scale (VAR's "partially shared" phi)."""
    import numpy as np

    edge = 1 / 3 / convolutions if convolutions == 4 else 1 / 2 / convolutions
    return schedule.nearest(np.linspace(edge, 1 - edge, convolutions).tolist())
