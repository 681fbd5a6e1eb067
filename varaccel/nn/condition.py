"""What the images of a call are conditioned on, before any network has read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Conditions of B images. Every network of a call reads them by itself.

    Attributes:
        values: class labels [B], text features [B, T, C], or prompt token ids [B, T].
        mask: [B, T], nonzero at valid entries of left-padded values; None if all are.
        negative: what the unconditional branch of guidance reads instead, B rows of any length; None for the
            network's own null condition, which has the shape and mask of `values`.
    """

    values: Tensor
    mask: Tensor | None = None
    negative: Condition | None = None

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    def repeat_interleave(self, times: int) -> Condition:
        """The condition of `times` images of each row, beside each other."""
        if times == 1:
            return self
        return replace(
            self,
            values=self.values.repeat_interleave(times, 0),
            mask=None if self.mask is None else self.mask.repeat_interleave(times, 0),
            negative=None if self.negative is None else self.negative.repeat_interleave(times),
        )
