"""Classifier-free guidance of masked models with a diffusion head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from varaccel.engine.options import check_choice, check_number, settle

GuidanceSchedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class MaskedGuidance:
    """How far to move from the unconditional towards the conditional prediction of the noise.

    Attributes:
        scale: 1 or less means no guidance; the unconditional rows are then not computed at all.
        schedule: "linear": from 1 with an empty image to `scale` with a full one (MAR, section 4); "constant".

    Raises:
        InputError: a scale that is not a finite number of at least 0, or an unknown schedule.
    """

    scale: float = 1.0
    schedule: GuidanceSchedule = "linear"

    def __post_init__(self) -> None:
        settle(self, scale=check_number("guidance_scale", self.scale, off="1 and less = off"))
        check_choice("guidance_schedule", self.schedule, get_args(GuidanceSchedule))

    @property
    def enabled(self) -> bool:
        return self.scale > 1

    def at(self, share: float | Tensor) -> float | Tensor:
        """The scale of an iteration after which a `share` of the image is decided."""
        return self.scale if self.schedule == "constant" else 1 + (self.scale - 1) * share
