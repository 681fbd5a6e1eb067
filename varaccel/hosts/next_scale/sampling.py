"""Guidance and filters of next-scale models, which may differ from scale to scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from varaccel.engine.distribution import Categorical
from varaccel.errors import InputError
from varaccel.nn.scale_schedule import ScaleSchedule


@dataclass(frozen=True)
class ScaleGuidance:
    """Classifier-free guidance that grows with the scale: logits c + t (c - u) with t = (`scale` - 1) * progress.

    The first scale is never guided, the last one fully (VAR, published sampler). The published samplers call
    t of the last scale `cfg`, so `scale` is 1 + `cfg`: as in other families, 1 means no guidance.

    Attributes:
        scale: guidance of the last scale; 1 means no guidance, and halves the work.

    Raises:
        InputError: not a finite number of at least 1.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.scale, (int, float)) and math.isfinite(self.scale)
        if not number or self.scale < 1:
            raise InputError(
                f"guidance_scale of a next-scale model must be a number >= 1 (1 = off; 1 + the published cfg), "
                f"got {self.scale}."
            )

    @classmethod
    def published(cls, cfg: float) -> ScaleGuidance:
        """The guidance that the published samplers call `cfg`."""
        return cls(1 + cfg)

    @property
    def enabled(self) -> bool:
        return self.scale > 1

    def strength(self, schedule: ScaleSchedule, scale: int) -> float:
        """t of a scale."""
        return (self.scale - 1) * schedule.progress(scale)


@dataclass(frozen=True)
class ScaleSampling:
    """How the tokens of a scale are drawn: top-k, then top-p, then temperature.

    Temperature thus never changes which tokens survive, in VAR's and CoDe's published samplers; elsewhere in this
    library it comes first.

    Attributes:
        temperature: one number, or one per scale; 0 takes the most likely token instead of drawing.
        top_k: keep the k most likely tokens, 0 for all; ties with the k-th are all kept. One number or one per
            scale.
        top_p: drop the least likely tokens whose mass together is at most 1 - top_p; 1 (or 0, as published) for
            all.

    Raises:
        InputError: a value out of range or not a number.
    """

    temperature: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if not all(
            isinstance(t, (int, float)) and math.isfinite(t) and t >= 0 for t in _values(self.temperature)
        ):
            raise InputError(
                f"temperature must be a number >= 0, or one per scale, got {self.temperature!r}."
            )
        if not all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in _values(self.top_k)):
            raise InputError(
                f"top_k must be an integer >= 0 (0 = off), or one per scale, got {self.top_k!r}."
            )
        if not isinstance(self.top_p, (int, float)) or not 0 <= self.top_p <= 1:
            raise InputError(f"top_p must be in [0, 1], got {self.top_p!r}.")

    def check(self, schedule: ScaleSchedule, vocab_size: int) -> None:
        """Refuse settings that do not fit a model of that schedule and vocabulary.

        Raises:
            InputError: a list of another length than there are scales, or top_k above the size of the vocabulary.
        """
        for name in ("temperature", "top_k"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(schedule):
                raise InputError(
                    f"{name} has {len(value)} entries but the model has {len(schedule)} scales; give one number "
                    "or one per scale."
                )
        if max(_values(self.top_k)) > vocab_size:
            raise InputError(
                f"top_k={max(_values(self.top_k))} is more than the model's {vocab_size} tokens."
            )

    def keep(self, logits: Tensor, scale: int) -> Tensor:
        """Logits [..., V] of a scale with -inf at dropped tokens, not yet divided by the temperature."""
        top_k = _at(self.top_k, scale)
        ordered: Tensor | None = None
        if 0 < top_k < logits.shape[-1]:
            ordered = logits.topk(top_k, dim=-1).values
            logits = logits.masked_fill(logits < ordered[..., -1:], -torch.inf)
        if 0 < self.top_p < 1:
            # only what top-k left needs to be in order; ties beyond its k-th count in the mass
            ordered = logits.sort(dim=-1, descending=True).values if ordered is None else ordered
            mass = (ordered - logits.logsumexp(dim=-1, keepdim=True)).exp()
            before = mass.cumsum(dim=-1) - mass
            kept = before < self.top_p
            kept[..., 0] = True
            border = ordered.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
            logits = logits.masked_fill(logits < border, -torch.inf)
        return logits

    def distribution(self, kept: Tensor, scale: int) -> Categorical:
        """The distribution of tokens [B, P] from logits [B, P, V] that `keep` returned."""
        temperature = _at(self.temperature, scale)
        if temperature == 0:
            return Categorical(kept, greedy=True)
        return Categorical(kept if temperature == 1 else kept / temperature)


Number = TypeVar("Number", int, float)


def _values(value: Number | Sequence[Number]) -> tuple[Number, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _at(value: Number | Sequence[Number], scale: int) -> Number:
    return value[scale] if isinstance(value, Sequence) else value
