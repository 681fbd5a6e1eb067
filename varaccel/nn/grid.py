"""The rows and columns that image tokens stand in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from varaccel.nn.devices import HOST


@dataclass(frozen=True)
class Grid:
    """One grid of image tokens in raster order.

    Attributes:
        height, width: rows and columns of image tokens.
        end_of_line: id of the token that follows the last column of every row (Lumina-mGPT, Emu3); None for grids
            without such tokens.
    """

    height: int
    width: int
    end_of_line: int | None = None

    @property
    def pitch(self) -> int:
        """Positions from one row to the next."""
        return self.width + (self.end_of_line is not None)

    @property
    def num_positions(self) -> int:
        return self.height * self.pitch


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # the table outlives the call, which may run in that mode
def line_ends(grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """[N] id of the end-of-line token that stands at each position of the grids one after the other, -1 for none."""
    rows = []
    for grid in grids:
        ends = torch.full((grid.height, grid.pitch), -1, dtype=torch.int64, device=HOST)
        if grid.end_of_line is not None:
            ends[:, -1] = grid.end_of_line
        rows.append(ends.flatten())
    return torch.cat(rows).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def positions_above(grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """[N] the position above each position of the grids one after the other, -1 in the first row of a grid."""
    above, first = [], 0
    for grid in grids:
        places = torch.arange(grid.num_positions, device=HOST)
        above.append(torch.where(places >= grid.pitch, places - grid.pitch + first, -1))
        first += grid.num_positions
    return torch.cat(above).to(device)


def possible_tokens(positions: Tensor, grids: tuple[Grid, ...], vocab_size: int) -> Tensor:
    """Which token ids may stand at `positions` [...] of grids with ends of line: bool [..., V].

    An end of line is the only token that can follow a row, and stands nowhere else.
    """
    ends = {grid.end_of_line for grid in grids if grid.end_of_line is not None}
    expected = line_ends(grids, positions.device)[positions].unsqueeze(-1)  # [..., 1]
    ids = torch.arange(vocab_size, device=positions.device)
    elsewhere = torch.isin(ids, torch.tensor(sorted(ends), device=positions.device), invert=True)
    return torch.where(expected >= 0, ids == expected, elsewhere)
