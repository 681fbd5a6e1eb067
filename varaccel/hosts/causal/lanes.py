"""Which positions may be drafted and decided next when every image advances at its own pace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas


@dataclass(frozen=True)
class Fronts:
    """Where the open lanes of every image stand; entries of closed lanes fill up to the widest image.

    Attributes:
        open: [B, A] bool, False for filling.
        start: [B, A] the next position that each lane decides, -1 for filling.
        limit: [B, A] number of positions from `start` that may be decided in this pass.
        end: [B, A] number of positions from `start` to the end of the lane.
        source: [B, A] canvas position whose token is read in slot `start - 1`: that position itself, or a
            stand-in for it.
        refresh: [B] position whose token arrived in the last pass after a stand-in was read for it, -1 if
            there is none; None in a single lane, where nothing comes late.
    """

    open: Tensor
    start: Tensor
    limit: Tensor
    end: Tensor
    source: Tensor
    refresh: Tensor | None


@dataclass(frozen=True)
class Lanes:
    """An image as lanes that are decoded from left to right, each behind the one above.

    One lane of the whole image is raster order. One lane per row with `lag` below its width is ZipAR's
    order (arXiv 2412.04062): column c of a row may be decided when the row above has c + lag tokens, so a
    token never sees less than in ZipAR's own schedule. What is open is a function of the canvas alone.

    Attributes:
        width: positions of a lane.
        lag: tokens that a lane stays behind the one above, 1 to `width`.
    """

    width: int
    lag: int

    @classmethod
    def raster(cls, positions: int) -> Lanes:
        return cls(positions, positions)

    @classmethod
    def rows(cls, grid_width: int, positions: int, window: int) -> Lanes:
        """ZipAR's order; raster order if the window is no smaller than the grid."""
        return cls.raster(positions) if window >= grid_width else cls(grid_width, window)

    def most_open(self, positions: int) -> int:
        """The largest number of lanes that are ever open at once."""
        return min(positions // self.width, math.ceil(self.width / self.lag))

    def fronts(self, canvas: Canvas, step: int | Tensor, *, fixed: bool = False) -> Fronts:
        """What is open before pass `step`, or [B, 1] that of each image.

        Args:
            fixed: always return `most_open` lanes, so that shapes never change; otherwise the number that
                the widest image needs, which synchronises with the device if there are several lanes.
        """
        width, lag = self.width, self.lag
        written = canvas.written.unflatten(1, (-1, width))  # [B, H, W]
        done = (written > 0).sum(-1)  # [B, H]
        height, device = done.shape[1], done.device
        lane = torch.arange(height, device=device)
        above = torch.cat([torch.full_like(done[:, :1], width), done[:, :-1]], dim=1)
        above_full = above == width
        limit = torch.where(above_full, width, above - lag + 1)
        open_ = done < limit.clamp(max=width)
        count = self.most_open(canvas.num_positions)
        if count > 1 and not fixed:
            count = max(1, int(open_.sum(1).max()))
        # open lanes first, from the top
        chosen = torch.where(open_, lane, lane + height).argsort(dim=1)[:, :count]  # [B, A]
        is_open = open_.gather(1, chosen)
        begun = done.gather(1, chosen)
        start = chosen * width + begun
        two_above = (chosen - 2).clamp(min=0)
        stand_in = two_above * width + done.gather(1, two_above) - 1
        follows = (begun > 0) | above_full.gather(1, chosen)
        if canvas.fixed is not None:  # an end of line that is given is known before the row above gets there
            follows |= (start > 0) & canvas.fixed.gather(1, (start - 1).clamp(min=0))
        source = torch.where(follows, start - 1, stand_in)
        # a lane that was finished in the last pass, while the next had begun from a stand-in
        late = (written[:, :-1, -1] == step - 1) & (done[:, 1:] > 0)
        refresh = torch.where(late, (lane[:-1] + 1) * width - 1, -1).amax(1) if height > 1 else None
        return Fronts(
            open=is_open,
            start=torch.where(is_open, start, -1),
            limit=torch.where(is_open, limit.clamp(max=width).gather(1, chosen) - begun, 0),
            end=torch.where(is_open, width - begun, 0),
            source=torch.where(is_open, source, -1),
            refresh=refresh,
        )
