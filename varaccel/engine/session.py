"""One network reading one canvas for one call, as far as the decoding loop needs to know it."""

from __future__ import annotations

from typing import Protocol, TypeVar

from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Distribution
from varaccel.engine.schedule import HasPositions

InputsIn = TypeVar("InputsIn", bound=HasPositions, contravariant=True)


class Session(Protocol[InputsIn]):
    """Owns what one network knows of one canvas, and answers for positions of it."""

    def predict(self, canvas: Canvas, inputs: InputsIn) -> Distribution:
        """The distribution of `inputs.positions`, after guidance and filters."""
        ...
