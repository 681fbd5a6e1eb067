"""A call of a model that decides one token after the other, rows side by side if it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from varaccel.engine.job import Job
from varaccel.engine.loop import decode
from varaccel.engine.randomness import Randomness
from varaccel.engine.schedule import Schedule
from varaccel.errors import InputError
from varaccel.hosts.causal.cache_slots import Visibility
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.lanes import Lanes
from varaccel.hosts.causal.network import CausalNetwork
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.causal.schedule import Raster, StepInputs
from varaccel.hosts.causal.session import CausalSession
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid

Neighbours = Callable[[int, bool], Tensor]
"""The codebook's table of nearest neighbours: (k, normalise) -> [V, k + 1] int."""


@dataclass(frozen=True, kw_only=True)
class CausalJob(Job):
    """What accelerators of causal models are given.

    Attributes:
        network: the host model.
        condition: of the B images.
        grids: that the image tokens stand in, one after the other.
        guidance, sampling: of the call.
        randomness: the draws of each image and position.
        schedule: in which the positions are decided without acceleration.
        neighbours: of the codebook; None where it has no vectors.
    """

    network: CausalNetwork
    condition: Condition
    grids: tuple[Grid, ...]
    guidance: Guidance
    sampling: Sampling
    randomness: Randomness
    schedule: Schedule[StepInputs] = field(default_factory=Raster)
    neighbours: Neighbours | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids V that the host model predicts."""
        size = self.network.signature().vocab_size
        assert size is not None, "a causal host predicts token ids"
        return size

    def _of_images(self, images: Sequence[int]) -> dict[str, Any]:
        return {"condition": self.condition.part(images), "randomness": self.randomness.part(images)}

    @property
    def grid(self) -> Grid:
        """The grid of the image, for methods that decode the rows of a single one side by side.

        Raises:
            InputError: an image of several grids.
        """
        if len(self.grids) > 1:
            raise InputError(
                f"this accelerator decodes the rows of one grid side by side, in an image of {len(self.grids)} grids "
                "only ZipAR does; leave row_window out, or use ZipAR."
            )
        return self.grids[0]

    def lanes(self, row_window: int | None) -> Lanes:
        """Lanes of a `row_window` option: rows that lag so many tokens behind each other; None for raster order.

        Raises:
            InputError: a window for an image of several grids.
        """
        positions = self.canvas.num_positions
        if row_window is None:
            return Lanes.raster(positions)
        return Lanes.rows(self.grid.pitch, positions, row_window)

    def open_session(
        self,
        network: CausalNetwork | None = None,
        *,
        draft_slots: int = 0,
        visibility: Visibility = "encoded",
    ) -> CausalSession:
        """A session of the host model, or of another network of the same signature.

        Args:
            draft_slots, visibility: see `CausalSession`.
        """
        chosen = self.network if network is None else network
        transform = self.transforms(chosen)
        session = CausalSession(
            chosen,
            self.condition,
            self.grids,
            guidance=self.guidance,
            sampling=self.sampling,
            visibility=visibility,
            draft_slots=draft_slots,
            given=self.canvas,
            static_shapes=transform is not None,
            transform=transform,
        )
        self.sessions.append(session)
        return session

    def decode(self) -> int:
        return decode(self.open_session(), self.canvas, self.schedule, self.randomness, self.on_step)
