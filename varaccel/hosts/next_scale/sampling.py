"""Guidance and filters of next-scale models, which may differ from scale to scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from varaccel.engine.distribution import Categorical
from varaccel.engine.options import MIN_TEMPERATURE, check_integer, check_number, settle
from varaccel.errors import InputError
from varaccel.nn.scale_schedule import ScaleSchedule


@dataclass(frozen=True)
class ScaleGuidance:
    """Classifier-free guidance: logits c + t (c - u), with t = `scale` - 1 at every scale, or growing to that.

    With a ramp the first scale is never guided, the last one fully (VAR, published sampler). The published samplers of
    VAR call t of the last scale `cfg`, so `scale` is 1 + `cfg`: as in other families, 1 means no guidance.

    Attributes:
        scale: guidance of the last scale, or one number per scale; 1 or less everywhere means no guidance, and halves
            the work.
        ramp: let it grow with the scale.
        inside: blocks after which the stream of both branches is replaced by the guided one, numbers from the end: 1
            for after the last block (Infinity's published code calls it an insertion layer of -1).
        on_logits: guide the logits, too; without it those of the conditional branch are taken as they are.

    Raises:
        InputError: not a finite number of at least 0.
    """

    scale: float | Sequence[float] = 1.0
    ramp: bool = True
    inside: tuple[int, ...] = ()
    on_logits: bool = True

    def __post_init__(self) -> None:
        off = "1 and less = off; 1 + the published cfg" if self.ramp else "1 and less = off"
        settle(self, scale=per_scale(self.scale, partial(check_number, "guidance_scale", off=off)))
        inside = tuple(
            check_integer("guidance inside", k, least=1, off="blocks from the end") for k in self.inside
        )
        settle(self, inside=inside)

    @classmethod
    def published(cls, cfg: float) -> ScaleGuidance:
        """The guidance that VAR's published samplers call `cfg`."""
        return cls(1 + cfg)

    @property
    def enabled(self) -> bool:
        return max(self.scale) > 1 if isinstance(self.scale, tuple) else self.scale > 1  # type: ignore[operator]

    def check(self, schedule: ScaleSchedule) -> None:
        """Refuse a list that does not fit a model of that schedule.

        Raises:
            InputError: another length than there are scales.
        """
        check_length("guidance_scale", self.scale, schedule)

    def strength(self, schedule: ScaleSchedule, scale: int) -> float:
        """t of a scale."""
        if not self.enabled:
            return 0.0
        return (at_scale(self.scale, scale) - 1) * (schedule.progress(scale) if self.ramp else 1.0)


class Sampling(Protocol):
    """How logits of a scale become a distribution, in two steps."""

    def check(self, schedule: ScaleSchedule) -> None:
        """Refuse settings that do not fit a model of that schedule."""
        ...

    def keep(self, logits: Tensor, scale: int) -> Tensor:
        """Filtered logits [B, P, V] of a scale."""
        ...

    def distribution(self, kept: Tensor, scale: int) -> Any:
        """What is drawn from, of logits that `keep` returned."""
        ...


@dataclass(frozen=True)
class ScaleFilters:
    """Settings that all samplings of next-scale models have, one number each or one per scale; see there."""

    temperature: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature = partial(check_number, "temperature", off="or one per scale")
        top_k = partial(check_integer, "top_k", least=0, off="0 = off; or one per scale")
        settle(
            self,
            temperature=per_scale(self.temperature, temperature),
            top_k=per_scale(self.top_k, top_k),
            top_p=check_number("top_p", self.top_p, most=1, off="0 and 1 = off"),
        )

    def check(self, schedule: ScaleSchedule) -> None:
        """Refuse settings that do not fit a model of that schedule.

        Raises:
            InputError: a list of another length than there are scales.
        """
        for name in ("temperature", "top_k"):
            check_length(name, getattr(self, name), schedule)


@dataclass(frozen=True)
class ScaleSampling(ScaleFilters):
    """How the tokens of a scale are drawn: top-k, then top-p, then temperature.

    Temperature thus never changes which tokens survive, in VAR's and CoDe's published samplers; elsewhere in this
    library it comes first.

    Attributes:
        temperature: one number, or one per scale; 0 takes the most likely token instead of drawing.
        top_k: keep the k most likely tokens, 0 or more than there are for all; ties with the k-th are all kept. One
            number or one per scale.
        top_p: drop the least likely tokens whose mass together is at most 1 - top_p; 1 (or 0, as published) for
            all.

    Raises:
        InputError: a value out of range or not a number.
    """

    def keep(self, logits: Tensor, scale: int) -> Tensor:
        """Logits [..., V] of a scale with -inf at dropped tokens, not yet divided by the temperature."""
        top_k = at_scale(self.top_k, scale)
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
        temperature = at_scale(self.temperature, scale)
        if temperature == 0:
            return Categorical(kept, greedy=True)
        return Categorical(kept if temperature == 1 else kept / max(temperature, MIN_TEMPERATURE))


Number = TypeVar("Number", int, float)


def per_scale(value: object, check: Callable[[object], Number]) -> Number | tuple[Number, ...]:
    """One number, or one per scale, checked."""
    several = value.ndim > 0 if isinstance(value, (np.ndarray, Tensor)) else isinstance(value, (list, tuple))
    return tuple(map(check, cast("Sequence[object]", value))) if several else check(value)


def check_length(name: str, value: object, schedule: ScaleSchedule) -> None:
    """Refuse a setting with a number per scale that does not fit a schedule.

    Raises:
        InputError: another length than there are scales.
    """
    if isinstance(value, tuple) and len(value) != len(schedule):
        raise InputError(
            f"{name} has {len(value)} entries but the model has {len(schedule)} scales; give one number "
            "or one per scale."
        )


def at_scale(value: Number | Sequence[Number], scale: int) -> Number:
    """The setting of a scale."""
    return value[scale] if isinstance(value, Sequence) else value
