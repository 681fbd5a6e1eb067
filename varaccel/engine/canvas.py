"""What has been decided so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.errors import InputError


@dataclass
class Canvas:
    """N positions of a batch of images and, for each, in which pass it was decided.

    `written` serves every question about progress: which positions are empty, which cache slots may be looked
    at, which pass wrote a token. Taking a decision back is setting it to 0.

    Images whose places in a batch are taken by others when they are finished count their passes from their own first.

    Attributes:
        tokens: [B, N] int64 token ids, or [B, N, C] vectors for continuous models; 0 where empty.
        written: [B, N] int32, number of the pass that decided the position, counted from 1; 0 = empty.
        fixed: [B, N] bool, positions whose token is given: they are decided like all others, in some pass, but
            always for the token that stands there. None if there are none.
    """

    tokens: Tensor
    written: Tensor
    fixed: Tensor | None = None

    @classmethod
    def empty(
        cls, batch: int, positions: int, *, channels: int | None = None, device: torch.device | str = "cpu"
    ) -> Canvas:
        """A blank canvas for token ids, or for vectors of `channels` numbers."""
        written = torch.zeros(batch, positions, dtype=torch.int32, device=device)
        if channels is None:
            return cls(torch.zeros(batch, positions, dtype=torch.int64, device=device), written)
        return cls(torch.zeros(batch, positions, channels, dtype=torch.float32, device=device), written)

    @classmethod
    def given(cls, tokens: Tensor, fixed: Tensor) -> Canvas:
        """A canvas for token ids of which some are given and stay, on the device of `tokens`.

        Args:
            tokens: [B, N] int64 token ids; only those at fixed positions count.
            fixed: [B, N] bool.

        Raises:
            InputError: shapes that differ.
        """
        if tokens.dim() != 2 or tokens.shape != fixed.shape:
            raise InputError(
                f"given token ids and the mask of fixed ones must both be [B, N], got {list(tokens.shape)} and "
                f"{list(fixed.shape)}."
            )
        fixed = fixed.to(tokens.device, torch.bool)
        written = torch.zeros(tokens.shape, dtype=torch.int32, device=tokens.device)
        return cls(torch.where(fixed, tokens, 0), written, fixed)

    @property
    def batch(self) -> int:
        return self.written.shape[0]

    @property
    def num_positions(self) -> int:
        return self.written.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether every position of every image is decided. Synchronises with the device."""
        return bool((self.written > 0).all())

    def part(self, images: slice | Tensor) -> Canvas:
        """The canvas of some images: a view of the same memory for a slice, a copy for their numbers [n]."""
        fixed = None if self.fixed is None else self.fixed[images]
        return Canvas(self.tokens[images], self.written[images], fixed)

    def put_rows(self, rows: Tensor, other: Canvas) -> None:
        """Rows `rows` [n] become those of `other`, in order."""
        self.tokens[rows], self.written[rows] = other.tokens, other.written
        if self.fixed is not None and other.fixed is not None:
            self.fixed = self.fixed.index_copy(0, rows, other.fixed)  # it may be one row, expanded

    def keep_rows(self, rows: Tensor) -> None:
        """Only rows `rows` [n] stay, in this order."""
        kept = self.part(rows)
        self.tokens, self.written, self.fixed = kept.tokens, kept.written, kept.fixed

    def show_fixed(self, positions: Tensor) -> None:
        """Count some fixed positions, [N] bool, as decided in the first pass, for schedules that only read them."""
        if self.fixed is not None:
            self.written.masked_fill_(self.fixed & positions & (self.written == 0), 1)

    def write(self, positions: Tensor, values: Tensor, step: int | Tensor) -> None:
        """Decide positions in pass `step`.

        Args:
            step: one for all, or [B, 1] int32 with that of each image, for a list of positions per row.
            positions: [P] shared by the batch, or [B, P] with one list per row; in a list per row, -1 is
                padding and its value is ignored.
            values: [B, P] token ids or [B, P, C] vectors; ignored where the token is fixed.
        """
        if self.fixed is not None:
            values = self._keep_fixed(self.fixed, positions, values)
        if positions.dim() == 1:
            self.tokens[:, positions] = values
            self.written[:, positions] = step
            return
        # A padded entry must not touch the row: it goes to a column of its own that is cut off again.
        used = positions >= 0
        target = torch.where(used, positions, self.num_positions)
        tokens = torch.cat([self.tokens, torch.zeros_like(self.tokens[:, :1])], dim=1)
        written = torch.cat([self.written, torch.zeros_like(self.written[:, :1])], dim=1)
        index = target if values.dim() == 2 else target.unsqueeze(-1).expand_as(values)
        tokens.scatter_(1, index, values)
        if isinstance(step, Tensor):
            written.scatter_(1, target, step.expand_as(target))
        else:
            written.scatter_(1, target, step)
        self.tokens.copy_(tokens[:, :-1])
        self.written.copy_(written[:, :-1])

    def _keep_fixed(self, fixed: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        """`values` with the tokens that stand at fixed positions in their place."""
        index = positions.expand(self.batch, -1) if positions.dim() == 1 else positions.clamp(min=0)  # [B, P]
        stays = fixed.gather(1, index)
        if values.dim() == 3:
            stays, index = stays.unsqueeze(-1), index.unsqueeze(-1).expand_as(values)
        return torch.where(stays, self.tokens.gather(1, index), values)
