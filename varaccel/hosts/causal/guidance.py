"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) on logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.options import check_integer, check_number, settle


@dataclass(frozen=True)
class Guidance:
    """How far to move from the unconditional towards the conditional prediction.

    Attributes:
        scale: 1 or less means no guidance; the unconditional branch is then not computed at all.
        interval: guide image tokens 0 to `interval` + 1 only, -1 for all (LlamaGen's `cfg_interval`, which
            counts decoding steps after the prefill). After that the unconditional branch is dropped.

    Raises:
        InputError: a scale that is not a finite number of at least 0, an interval that is no integer of at least -1.
    """

    scale: float = 1.0
    interval: int = -1

    def __post_init__(self) -> None:
        interval = check_integer("guidance_interval", self.interval, least=-1, off="-1 = always")
        scale = check_number("guidance_scale", self.scale, off="1 and less = off")
        settle(self, scale=scale, interval=interval)

    @property
    def enabled(self) -> bool:
        return self.scale > 1

    @property
    def last_position(self) -> float:
        """The last image token whose prediction is guided."""
        return math.inf if self.interval < 0 else self.interval + 1

    def active_at(self, position: int) -> bool:
        """Whether the prediction of this image token is guided."""
        return self.enabled and position <= self.last_position

    def combine(self, conditional: Tensor, unconditional: Tensor, positions: Tensor | None = None) -> Tensor:
        """uncond + scale * (cond - uncond), on raw float32 logits.

        Args:
            conditional, unconditional: [B, P, V].
            positions: [P] or [B, P], of the tokens that they predict; those beyond the interval are not guided. All
                are if None.
        """
        guided = unconditional + self.scale * (conditional - unconditional)
        if positions is None or self.interval < 0:
            return guided
        active = positions <= self.last_position
        return torch.where(active.unsqueeze(-1), guided, conditional)
