"""Verification of blocks of continuous groups: all at once as published, or each in sight of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.engine.canvas import Canvas
from varaccel.hosts.masked.distribution import DiffusionDistribution
from varaccel.hosts.masked.schedule import CosineGroups, MaskedInputs
from varaccel.hosts.masked.session import MaskedSession


@dataclass(frozen=True, eq=False)
class Kept:
    """What becomes of a verified block.

    Attributes:
        positions: [B, N] decided for good, -1 elsewhere.
        taken_back: [B, N] to be drafted again, -1 elsewhere; None if nothing ever is.
        groups: groups that are decided, per image.
    """

    positions: Tensor
    taken_back: Tensor | None
    groups: list[int]


class GroupVerification(Protocol):
    """How the target verifies a block of drafted groups in one pass."""

    @property
    def group_width(self) -> int:
        """What the positions of every group of a block are padded to; 0 if groups are as wide as they are."""
        ...

    def block(self, step_inputs: Sequence[MaskedInputs], steps: Sequence[int]) -> list[MaskedInputs]:
        """The groups to draft next.

        Args:
            step_inputs: all groups of the image, in their order.
            steps: groups that are decided, per image; at least one image has groups left.
        """
        ...

    def predict(
        self, canvas: Canvas, block: Sequence[MaskedInputs], positions: Tensor
    ) -> DiffusionDistribution:
        """The target's distribution at the positions [B, N] of the block's groups, one group after the other."""
        ...

    def keep(self, positions: Tensor, accepted: Tensor, groups: int) -> Kept:
        """Which decisions stand.

        Args:
            positions: [B, N] of all groups, -1 is padding.
            accepted: [B, N] bool, true in padding; elsewhere tokens were replaced.
            groups: their number.
        """
        ...


@dataclass(frozen=True, eq=False)
class JointVerification:
    """One pass that sees none of the drafted tokens; what it decides is decided for good.

    So the number of passes does not depend on what is accepted. The target's distribution of a block is that of
    deciding all its groups at once: plain decoding with fewer iterations.

    Source: the published code of continuous speculative decoding (arXiv 2411.11925): blocks end at multiples of
    `draft_length`, and guidance of a block is that of its last iteration.

    Attributes:
        target: a session of the large network.
        draft_length: groups per block.
    """

    target: MaskedSession
    draft_length: int

    @property
    def group_width(self) -> int:
        return 0

    def block(self, step_inputs: Sequence[MaskedInputs], steps: Sequence[int]) -> list[MaskedInputs]:
        first = steps[0]  # all images are equally far
        last = -(-first // self.draft_length) * self.draft_length
        return list(step_inputs[first : last + 1])

    def predict(
        self, canvas: Canvas, block: Sequence[MaskedInputs], positions: Tensor
    ) -> DiffusionDistribution:
        first, last = block[0], block[-1]
        return self.target.predict(canvas, MaskedInputs(positions, first.known, last.remaining, first.number))

    def keep(self, positions: Tensor, accepted: Tensor, groups: int) -> Kept:
        return Kept(positions, None, [groups] * len(positions))


@dataclass(frozen=True, eq=False)
class SequentialVerification:
    """Every group in sight of those before it; groups after the first with a rejection are drafted again.

    A block costs one pass over `draft_length` canvases per image: attention looks both ways, so nothing of one serves
    another. Images advance at their own pace. The device is asked once per block how far they are.

    The distribution is the target's if a kept token is what later groups of its block were drafted and verified
    in sight of: if tokens themselves are compared (`Comparison.step` 0) by a rule that keeps the target's distribution.

    Attributes:
        target: a session of the large network with `draft_length` canvases per image.
        schedule: the groups of the images.
        draft_length: groups per block.
    """

    target: MaskedSession
    schedule: CosineGroups
    draft_length: int

    @property
    def group_width(self) -> int:
        return self.schedule.widest

    def block(self, step_inputs: Sequence[MaskedInputs], steps: Sequence[int]) -> list[MaskedInputs]:
        device = step_inputs[0].positions.device
        return [self.schedule.ragged([step + i for step in steps], device) for i in range(self.draft_length)]

    def predict(
        self, canvas: Canvas, block: Sequence[MaskedInputs], positions: Tensor
    ) -> DiffusionDistribution:
        groups = len(block)
        most = max(inputs.known.shape[1] for inputs in block)
        # a canvas of its own for every group, of which it reads what was known when it was drafted
        known = torch.cat([F.pad(f.known, (0, most - f.known.shape[1]), value=-1) for f in block], 1)
        remaining = torch.stack(
            [torch.as_tensor(f.remaining, device=known.device) for f in block], 1
        )  # [B, G]
        canvases = Canvas(
            canvas.tokens.repeat_interleave(groups, 0), canvas.written.repeat_interleave(groups, 0)
        )
        inputs = MaskedInputs(
            positions.unflatten(1, (groups, -1)).flatten(0, 1),
            known.unflatten(1, (groups, -1)).flatten(0, 1),
            remaining.flatten(),
            block[0].number,
            padded=True,
        )
        distribution = self.target.predict(canvases, inputs)
        conditions = distribution.conditions.unflatten(0, (-1, groups)).flatten(1, 2)  # [R, G * P, D]
        return DiffusionDistribution(distribution.process, conditions, distribution.scale)

    def keep(self, positions: Tensor, accepted: Tensor, groups: int) -> Kept:
        by_group = (len(positions), groups, -1)
        broken = (~accepted).view(by_group).any(2).to(torch.int64)  # [B, G]
        # all groups before the first in which something was replaced, and that one
        stands = broken.cumsum(1) - broken == 0
        kept = stands.unsqueeze(2).expand(*stands.shape, positions.shape[1] // groups).flatten(1)
        return Kept(
            torch.where(kept, positions, -1),
            torch.where(kept, -1, positions),
            stands.sum(1).tolist(),
        )
