"""The decoding loop: all control flow of decoding without drafting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.schedule import HasPositions, Schedule
from varaccel.engine.session import Session


@dataclass(frozen=True)
class Step:
    """What an observer is shown after a pass.

    Attributes:
        number: of the pass, counted from 1; the number that `canvas.written` holds.
        progress: share of the work that is done, 0 to 1.
        positions: what the pass decided, [P], or [B, P] with -1 as padding.
        canvas: the canvas after the pass; observers must not change it.
    """

    number: int
    progress: float
    positions: Tensor
    canvas: Canvas

    @property
    def decided(self) -> int:
        """Tokens decided per image; the most of any image if they differ (synchronises with the device then)."""
        if self.positions.dim() == 1:
            return self.positions.shape[0]
        return int((self.positions >= 0).sum(1).max())


OnStep = Callable[[Step], None]
"""The one observation point; it may raise to end the call."""

AnyInputs = TypeVar("AnyInputs", bound=HasPositions)
AnyDistribution = TypeVar("AnyDistribution")
DistributionIn = TypeVar("DistributionIn", contravariant=True)


class DrawsTokens(Protocol[DistributionIn]):
    """A source of randomness as the loop sees it: `Randomness`, or another stream."""

    def sample(self, distribution: DistributionIn, positions: Tensor) -> Tensor:
        """Values [B, P] (or [B, P, C]) of `positions` ([P] or [B, P]) drawn from their distribution."""
        ...


@torch.inference_mode()
def decode(
    session: Session[AnyInputs, AnyDistribution],
    canvas: Canvas,
    schedule: Schedule[AnyInputs],
    randomness: DrawsTokens[AnyDistribution],
    on_step: OnStep | None = None,
) -> int:
    """Fill the canvas step by step, each group from one prediction. Returns the number of passes.

    Nothing in the loop waits for the device: positions are known ahead or stay on the device, draws are made
    from numbers drawn ahead.
    """
    step_inputs = schedule.step_inputs(canvas)
    number = 0
    for number, inputs in enumerate(step_inputs, start=1):
        distribution = session.predict(canvas, inputs)
        canvas.write(inputs.positions, randomness.sample(distribution, inputs.positions), number)
        if on_step is not None:
            on_step(Step(number, number / len(step_inputs), inputs.positions, canvas))
    return number
