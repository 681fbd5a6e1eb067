"""Next-scale order: all positions of a scale are decided together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.nn.scale_schedule import ScaleSchedule


@dataclass(frozen=True)
class ScaleInputs:
    """One scale.

    Attributes:
        positions: [p * p] its positions on the canvas.
        scale: its number, from 0.
    """

    positions: Tensor
    scale: int


@dataclass(frozen=True)
class Scales:
    """Scale after scale, coarse to fine (VAR, arXiv 2404.02905, section 3.2).

    Attributes:
        scales: of the images.
        stop: how many of them are decided; all if None.
    """

    scales: ScaleSchedule
    stop: int | None = None

    def step_inputs(self, canvas: Canvas) -> list[ScaleInputs]:
        positions = torch.arange(canvas.num_positions, device=canvas.written.device)
        numbers = range(len(self.scales))[: self.stop]
        return [ScaleInputs(positions[self.scales.span(s)], s) for s in numbers]
