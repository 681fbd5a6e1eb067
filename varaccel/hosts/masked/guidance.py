"""Classifier-free guidance of masked models with a diffusion head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from varaccel.engine.options import check_choice
from varaccel.errors import InputError

GuidanceSchedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class MaskedGuidance:
    """How far to move from the unconditional towards the conditional prediction of the noise.

    Attributes:
        scale: 1 means no guidance; the unconditional rows are then not computed at all.
        schedule: "linear": from 1 with an empty image to `scale` with a full one (MAR, section 4); "constant".

    Raises:
        InputError: a scale that is not a finite number of at least 1, or an unknown schedule.
    """

    scale: float = 1.0
    schedule: GuidanceSchedule = "linear"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale) or self.scale < 1:
            raise InputError(
                f"guidance_scale of a masked model must be a finite number >= 1 (1 = off), got {self.scale}."
            )
        check_choice("guidance_schedule", self.schedule, get_args(GuidanceSchedule))

    @property
    def enabled(self) -> bool:
        return self.scale != 1

    def at(self, share: float | Tensor) -> float | Tensor:
        """The scale of an iteration after which a `share` of the image is decided."""
        return self.scale if self.schedule == "constant" else 1 + (self.scale - 1) * share
