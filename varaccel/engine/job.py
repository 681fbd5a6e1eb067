"""One call as an accelerator sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from varaccel.engine.canvas import Canvas
from varaccel.engine.loop import OnStep
from varaccel.engine.randomness import Randomness
from varaccel.engine.schedule import Schedule
from varaccel.hosts.causal.lanes import Lanes


@dataclass(frozen=True)
class Job:
    """One call as an accelerator sees it.

    Attributes:
        open_session: makes a session for this call, of the host model or of another `network` of the same
            conditions and codes; takes the session's options. What it makes depends on the family: a
            `CausalSession` for networks that decide one token after the other.
        network: the host model.
        grid_width: columns of the token grid.
        codes: size of the vocabulary, 0 where tokens are continuous.
        canvas: to be filled.
        rows: rows that a pass reads per token: images, times two while guided.
        randomness: the draws of each image and position. A family may offer another source of draws; then only
            its `sample` can be relied on.
        schedule: in which the family decides its positions without acceleration.
        on_step: observer of every pass.
        neighbours: gives the codebook's table of nearest neighbours, (k, normalise) -> [V, k + 1] int.
        drafters: the drafters that came with the model, by name.
    """

    open_session: Callable[..., Any]
    network: nn.Module
    grid_width: int
    codes: int
    canvas: Canvas
    rows: int
    randomness: Randomness
    schedule: Schedule[Any]
    on_step: OnStep | None = None
    neighbours: Callable[[int, bool], Tensor] | None = None
    drafters: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.canvas.written.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the host model's weights."""
        return next(self.network.parameters()).dtype

    def lanes(self, row_window: int | None) -> Lanes:
        """Lanes of a `row_window` option: rows that lag so many tokens behind each other; None for raster order."""
        if row_window is None:
            return Lanes.raster(self.canvas.num_positions)
        return Lanes.rows(self.grid_width, self.canvas.num_positions, row_window)
