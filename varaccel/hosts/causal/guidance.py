"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) on logits, between any number of branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from varaccel.engine.options import check_integer, check_number, settle
from varaccel.errors import InputError


@dataclass(frozen=True)
class Guidance:
    """How far to move from less to more conditional predictions.

    A condition has branches 0 (the conditional one) to n, see `Condition.negative`, which say the logits l_0 to l_n.
    A model with guidance of scales s_1 to s_n draws from

        l_n + s_1 (l_0 - l_1) + s_2 (l_1 - l_2) + ... + s_n (l_{n-1} - l_n).

    With one scale that is unconditional + scale * (conditional - unconditional). With two and the branches text and
    image, image only, none, it is equation 3 of InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800): a scale for
    the text, then one for the image. Several prompts with weights w_1 to w_n against a last branch, as in composable
    diffusion (Liu et al. 2022, arXiv 2206.01714), have the scales w_1, w_1 + w_2, ..., w_1 + ... + w_n.

    Attributes:
        scale: one number, if the condition has two branches: 1 or less means no guidance; the unconditional branch is
            then not computed at all. Or s_1 to s_n, one for each branch but the last; all 1 means no guidance.
        interval: guide image tokens 0 to `interval` + 1 only, -1 for all (LlamaGen's `cfg_interval`, which
            counts decoding steps after the prefill). After that all branches but the conditional one are dropped.

    Raises:
        InputError: a scale that is not a finite number of at least 0, or no scale; an interval that is no integer of
            at least -1.
    """

    scale: float | Sequence[float] = 1.0
    interval: int = -1

    def __post_init__(self) -> None:
        interval = check_integer("guidance_interval", self.interval, least=-1, off="-1 = always")
        several = self.scale if isinstance(self.scale, (list, tuple)) else (self.scale,)
        if not several:
            raise InputError("guidance_scale has no numbers; give one for every branch but the last.")
        off = "1 and less = off" if len(several) == 1 else ""
        scales = tuple(check_number("guidance_scale", scale, off=off) for scale in several)
        settle(self, scale=scales[0] if len(scales) == 1 else scales, interval=interval)

    @property
    def scales(self) -> tuple[float, ...]:
        """One for each branch but the last."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def enabled(self) -> bool:
        # a weighted mean of prompts has no scale above 1, so of several scales only ones are no guidance
        scales = self.scales
        return scales[0] > 1 if len(scales) == 1 else any(scale != 1 for scale in scales)

    @property
    def branches(self) -> int:
        """Network rows of an image in a guided pass; 1 without guidance."""
        return len(self.scales) + 1 if self.enabled else 1

    @property
    def last_position(self) -> float:
        """The last image token whose prediction is guided."""
        return math.inf if self.interval < 0 else self.interval + 1

    def active_at(self, position: int) -> bool:
        """Whether the prediction of this image token is guided."""
        return self.enabled and position <= self.last_position

    def check_branches(self, branches: int) -> None:
        """Refuse a condition of another number of branches than there are scales for; without guidance any will do.

        Raises:
            InputError: numbers that do not fit.
        """
        if self.enabled and branches != self.branches:
            wanted = "one number" if branches == 2 else f"{branches - 1} numbers"
            raise InputError(
                f"guidance_scale must be {wanted}, one for each of the {branches} branches of the condition but the "
                f"last, got {len(self.scales)}."
            )

    def combine(self, *branches: Tensor, positions: Tensor | None = None) -> Tensor:
        """The guided logits, see above, from raw float32 logits.

        Args:
            branches: [B, P, V] each, the conditional one first.
            positions: [P] or [B, P], of the tokens that they predict; those beyond the interval are not guided. All
                are if None.
        """
        guided = branches[-1]
        for scale, (more, less) in zip(self.scales, pairwise(branches), strict=True):
            guided = guided + scale * (more - less)
        if positions is None or self.interval < 0:
            return guided
        active = positions <= self.last_position
        return torch.where(active.unsqueeze(-1), guided, branches[0])
