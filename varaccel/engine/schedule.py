"""Which positions are decided together, pass by pass, as far as the decoding loop needs to know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from varaccel.engine.canvas import Canvas


class HasPositions(Protocol):
    """What the decoding loop knows of the inputs of a step; the rest is between a schedule and its sessions."""

    @property
    def positions(self) -> Tensor:
        """[P] decided positions; [B, P] with -1 as padding where rows advance at different speeds."""
        ...


InputsOut = TypeVar("InputsOut", bound=HasPositions, covariant=True)


class Schedule(Protocol[InputsOut]):
    """A function of the canvas: the groups in which its empty positions are decided."""

    def step_inputs(self, canvas: Canvas) -> Sequence[InputsOut]:
        """The inputs of every step, in the order in which they are run."""
        ...
