"""What the images of a call are conditioned on, before any network has read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varaccel.errors import InputError


@dataclass(frozen=True)
class Condition:
    """Conditions of B images. Every network of a call reads them by itself.

    Attributes:
        values: class labels [B], text features [B, T, C], or prompt token ids [B, T].
        mask: [B, T], nonzero at valid entries of left-padded values; None if all are.
        negative: what the unconditional branch of guidance reads instead, B rows of any length; None for the
            network's own null condition, which has the shape and mask of `values`. Several for guidance of several
            scales (see `Guidance`), the least conditional one last.

    Raises:
        InputError: branches with different numbers of rows, or with further branches of their own.
    """

    values: Tensor
    mask: Tensor | None = None
    negative: Condition | tuple[Condition, ...] | None = None

    def __post_init__(self) -> None:
        for branch in self.negatives:
            if branch.batch != self.batch:
                raise InputError(
                    f"every branch of a condition must have a row for each image, {self.batch} of them; a negative one "
                    f"has {branch.batch}."
                )
            if branch.negatives:
                raise InputError(
                    "a negative condition cannot have a negative one of its own; give all of them in one tuple."
                )

    @property
    def negatives(self) -> tuple[Condition, ...]:
        """What the branches of guidance after the first read; none for the network's own null condition."""
        if self.negative is None:
            return ()
        return (self.negative,) if isinstance(self.negative, Condition) else tuple(self.negative)

    @property
    def branches(self) -> int:
        """Number of branches of guidance, the conditional one included."""
        return 1 + max(1, len(self.negatives))

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    def part(self, images: Sequence[int] | slice) -> Condition:
        """The condition of some images."""
        index: Tensor | slice = (
            images if isinstance(images, slice) else torch.tensor(images, device=self.values.device)
        )
        return replace(
            self,
            values=self.values[index],
            mask=None if self.mask is None else self.mask[index],
            negative=tuple(branch.part(images) for branch in self.negatives) or None,
        )

    def repeat_interleave(self, times: int) -> Condition:
        """The condition of `times` images of each row, beside each other."""
        if times == 1:
            return self
        return replace(
            self,
            values=self.values.repeat_interleave(times, 0),
            mask=None if self.mask is None else self.mask.repeat_interleave(times, 0),
            negative=tuple(branch.repeat_interleave(times) for branch in self.negatives) or None,
        )
