"""What an accelerator tells of a call: passes, draft tokens, and the shares of networks that took turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SpeculationStats:
    """Counts of a call whose images advance at their own pace.

    Attributes:
        passes: [B] passes of the host model until the image was finished, the prefill included.
        attempts: [B] draft chains or trees that were verified.
        accepted: [B] tokens decided beyond the one that every verification yields: the draft tokens that paid off.
        draft_passes: forward passes of the drafter, shared by all images.
        verified: [B] draft tokens that were verified, where a rule keeps or replaces each; None where trees are
            walked down.
    """

    passes: Tensor
    attempts: Tensor
    accepted: Tensor
    draft_passes: int = 0
    verified: Tensor | None = None

    @classmethod
    def start(cls, batch: int, device: torch.device) -> SpeculationStats:
        """Before the first pass, in which nothing is drafted."""
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zero, zero.clone(), zero.clone())


@dataclass(frozen=True)
class Stage:
    """One network's share of a call in which several take turns.

    Attributes:
        name: what it is called.
        seconds: wall-clock time.
        passes: its forward passes.
        tokens: tokens per image that it decided.
        cache_bytes: size of its key-value cache.
    """

    name: str
    seconds: float
    passes: int
    tokens: int
    cache_bytes: int

    def __str__(self) -> str:
        return f"{self.name} {self.tokens} tokens in {self.passes} passes, {self.seconds:.2f} s"


@dataclass(frozen=True)
class StageStats:
    """Counts of a call in which several networks took turns.

    Attributes:
        passes: forward passes of all of them.
        stages: what each of them did, in order.
    """

    passes: int
    stages: tuple[Stage, ...]


def added_counts(told: Sequence[Counts]) -> Counts:
    """What is told of the batches of a call, one after the other, as if told of all of their images."""
    first = told[0]
    if len(told) == 1:
        return first
    if isinstance(first, int):
        return sum(one for one in told if isinstance(one, int))
    if isinstance(first, StageStats):
        stages = [one.stages for one in told if isinstance(one, StageStats)]
        return StageStats(
            sum(one.passes for one in told if isinstance(one, StageStats)),
            tuple(
                Stage(
                    same[0].name,
                    sum(stage.seconds for stage in same),
                    sum(stage.passes for stage in same),
                    same[0].tokens,
                    max(stage.cache_bytes for stage in same),
                )
                for same in zip(*stages, strict=True)
            ),
        )
    several = [one for one in told if isinstance(one, SpeculationStats)]
    verified = [one.verified for one in several if one.verified is not None]
    return SpeculationStats(
        torch.cat([one.passes for one in several]),
        torch.cat([one.attempts for one in several]),
        torch.cat([one.accepted for one in several]),
        sum(one.draft_passes for one in several),
        torch.cat(verified) if verified else None,
    )


Counts = int | SpeculationStats | StageStats
"""What an accelerator tells of a call: passes, or more if images have their own pace or networks take turns."""
