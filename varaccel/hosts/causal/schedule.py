"""Which positions are decided together, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.nn.devices import HOST
from varaccel.nn.grid import Grid


@dataclass(frozen=True)
class Group:
    """What one pass decides, for a causal network that predicts position p from the token in slot p - 1.

    Attributes:
        positions: decided in this pass.
        sources: for each of them, the canvas position whose token is fed in slot p - 1. Normally p - 1
            itself; another position is a stand-in for a predecessor that is not decided yet. Position 0 is
            predicted from the condition; its source is -1.
        refresh: positions whose own token is fed at its own slot although nothing is predicted from it: the
            late arrival of a token for which a stand-in was fed before.
    """

    positions: tuple[int, ...]
    sources: tuple[int, ...]
    refresh: tuple[int, ...] = ()

    @property
    def last_slot(self) -> int:
        """The last slot that is fed."""
        return max((*self.refresh, *(p - 1 for p in self.positions)))


@dataclass(frozen=True)
class StepInputs:
    """A group as tensors on the device.

    Attributes:
        positions: [P] decided positions; [B, P] with -1 as padding where rows advance at different speeds.
        tokens: [F] or [B, F] canvas positions whose tokens are fed; the first F - P are refreshed.
        slots: [F] or [B, F] image slots (0 = first image token) that they are fed in.
        host: the same group as plain numbers, None if only the device knows it.
    """

    positions: Tensor
    tokens: Tensor
    slots: Tensor
    host: Group | None = None

    @classmethod
    def ragged(cls, positions: Tensor) -> StepInputs:
        """Each row decides its own `positions` [B, P] from their true predecessors; -1 is padding."""
        before = torch.where(positions > 0, positions - 1, -1)
        return cls(positions, before, before)


def prepare(groups: Sequence[Group], device: torch.device) -> list[StepInputs]:
    """Move groups that are known ahead to the device in one copy."""
    numbers: list[int] = []
    sizes: list[int] = []
    for group in groups:
        slots = [*group.refresh, *(p - 1 for p in group.positions)]
        for part in (group.positions, (*group.refresh, *group.sources), slots):
            numbers.extend(part)
            sizes.append(len(part))
    parts = torch.tensor(numbers, dtype=torch.int64, device=HOST).to(device).split(sizes)
    return [
        StepInputs(parts[3 * i], parts[3 * i + 1], parts[3 * i + 2], host=group)
        for i, group in enumerate(groups)
    ]


@dataclass(frozen=True)
class Raster:
    """Row by row, left to right, one position per pass.

    Attributes:
        start: the first position that is decided; those before it must have been read.
    """

    start: int = 0

    def step_inputs(self, canvas: Canvas) -> list[StepInputs]:
        groups = [Group((p,), (p - 1,)) for p in range(self.start, canvas.num_positions)]
        return prepare(groups, canvas.written.device)


@dataclass(frozen=True)
class StaggeredRows:
    """Several rows at once, each `window` columns behind the row above (ZipAR, arXiv 2412.04062).

    A row starts when the row above has `window` tokens. The true predecessor of its first token, the end of
    the unfinished row above, is then unknown; the newest token one row further up stands in for it, and the
    true token replaces it in the cache as soon as it exists. A row whose predecessor is known starts from
    it, so `window >= width` is raster order.

    Models with end-of-line tokens need no stand-in: what a row starts from, the end of line of the row above,
    is known ahead. It must stand on the canvas already; it is fed, never decided.

    Attributes:
        width: columns of the grid that are decided.
        window: lag between rows, at least 1.
        first_row_alone: finish row 0 before row 1 starts, as the published code does: 2 W + (H - 2) s passes
            instead of W + (H - 1) s.
        end_of_line: every row has one further position, holding an end-of-line token (Lumina-mGPT, Emu3).
    """

    width: int
    window: int
    first_row_alone: bool = False
    end_of_line: bool = False

    def groups(self, positions: int) -> list[Group]:
        """The schedule for a grid of `positions` cells, ends of line included; depends on sizes only."""
        width, pitch = self.width, self.width + self.end_of_line
        height = positions // pitch
        lag = min(self.window, width)
        # starts[r]: number of passes before the one that decides (r, 0)
        starts = [0]
        for row in range(1, height):
            starts.append(starts[-1] + (width if row == 1 and self.first_row_alone else lag))
        groups = []
        for step in range(starts[-1] + width):
            decided: list[int] = []
            sources: list[int] = []
            refresh: list[int] = []
            for row, start in enumerate(starts):
                column = step - start
                first = row * pitch
                late = starts[row + 1] < start + width if row + 1 < height else False
                if column == width and (late or (self.end_of_line and row + 1 < height)):
                    refresh.append(first + width - 1)
                if not 0 <= column < width:
                    continue
                decided.append(first + column)
                if column > 0 or row == 0 or self.end_of_line or start >= starts[row - 1] + width:
                    sources.append(first + column - 1)
                else:
                    above = max(row - 2, 0)
                    known = min(start - starts[above], width)
                    sources.append(above * width + known - 1)
            groups.append(Group(tuple(decided), tuple(sources), tuple(refresh)))
        return groups

    def step_inputs(self, canvas: Canvas) -> list[StepInputs]:
        return prepare(self.groups(canvas.num_positions), canvas.written.device)


@dataclass(frozen=True)
class StaggeredGrids:
    """One grid after the other, the rows of each as `StaggeredRows` decides them.

    Attributes:
        grids: of the image.
        window, first_row_alone: see `StaggeredRows`. A grid that is no wider than the window is in raster order.
    """

    grids: tuple[Grid, ...]
    window: int
    first_row_alone: bool = False

    def groups(self) -> list[Group]:
        """The schedule; depends on sizes only."""
        groups: list[Group] = []
        first, unread = 0, -1
        for grid in self.grids:
            ends = grid.end_of_line is not None
            rows = StaggeredRows(grid.width, self.window, self.first_row_alone, end_of_line=ends)
            for group in rows.groups(grid.num_positions):
                positions, sources, refresh = (
                    tuple(position + first for position in part)
                    for part in (group.positions, group.sources, group.refresh)
                )
                # the last token of a grid that closes with a given end of line is read with that end
                late = (unread,) if positions[:1] == (first,) and unread >= 0 else ()
                groups.append(Group(positions, sources, late + refresh))
            first += grid.num_positions
            unread = first - 2 if ends else -1
        return groups

    def step_inputs(self, canvas: Canvas) -> list[StepInputs]:
        return prepare(self.groups(), canvas.written.device)
