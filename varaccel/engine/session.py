"""One network reading one canvas for one call, as far as the decoding loop needs to know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from varaccel.engine.canvas import Canvas
from varaccel.engine.schedule import HasPositions
from varaccel.nn.number_check import NumberCheck

InputsIn = TypeVar("InputsIn", bound=HasPositions, contravariant=True)
DistributionOut = TypeVar("DistributionOut", covariant=True)


class Session(Protocol[InputsIn, DistributionOut]):
    """Owns what one network knows of one canvas, and answers for positions of it."""

    def predict(self, canvas: Canvas, inputs: InputsIn) -> DistributionOut:
        """The distribution of `inputs.positions`, after guidance and filters."""
        ...


class OpenSession(Protocol):
    """What a call asks of its sessions: their cost, and whether their numbers were numbers."""

    @property
    def rows_per_pass(self) -> int:
        """Network rows of a pass; one per image and branch of guidance, two as a rule while guided."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Size of its key-value caches."""
        ...

    @property
    def number_checks(self) -> Sequence[NumberCheck]:
        """What looked at the numbers of its networks."""
        ...
