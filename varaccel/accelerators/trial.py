"""What a pass of an accelerator takes in the middle of an image, measured on the call itself."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from varaccel.engine.accelerator import Accelerator
from varaccel.engine.canvas import Canvas
from varaccel.engine.loop import Step
from varaccel.engine.randomness import GumbelNoise, Randomness
from varaccel.engine.seeds import seeded_generator
from varaccel.hosts.causal.cache_slots import Visibility
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.network import CausalNetwork
from varaccel.hosts.causal.schedule import Raster
from varaccel.hosts.causal.session import CausalSession
from varaccel.nn.devices import wait_for

TIMED = 2
"""Passes that are timed; the best counts, because what else runs can only make it slower."""


class _Enough(Exception):
    """Raised when enough passes were timed."""


class _BlockNoise(GumbelNoise):
    """One block of noise for all positions: a whole image of it would take longer to draw than the passes."""

    def at(self, positions: Tensor, before: int | None = None) -> Tensor:
        size = min(self.BLOCK, self.positions)
        return super().at(positions % size, size)


@dataclass
class _TrialRandomness(Randomness):
    """Draws that belong to no image."""

    noises: dict[int, GumbelNoise] = field(default_factory=dict, repr=False)

    def gumbel(self, vocab_size: int) -> GumbelNoise:
        if vocab_size not in self.noises:
            generators = [seeded_generator(seed) for seed in self.noise_seeds]
            shape = self.uniforms.shape[1], vocab_size
            self.noises[vocab_size] = _BlockNoise(generators, *shape, self.uniforms.device)
        return self.noises[vocab_size]


@dataclass
class _TrialCanvas(Canvas):
    """What is decided never counts as decided: every pass begins at the same position, and no image is ever finished,
    however few positions are left."""

    def write(self, positions: Tensor, values: Tensor, step: int | Tensor) -> None:
        written = self.written.clone()
        super().write(positions, values, step)
        self.written.copy_(written)


@dataclass(frozen=True, kw_only=True)
class TrialJob(CausalJob):
    """A call that has come half-way: same networks, condition, rows, guidance and sampling, other canvas and draws.

    Attributes:
        decided: positions that count as decided.
    """

    decided: int

    @classmethod
    def of(cls, job: CausalJob) -> TrialJob:
        """A trial of a call, of which it changes nothing."""
        canvas, images = job.canvas, job.canvas.batch
        decided = max(1, canvas.num_positions // 2)
        written = torch.zeros_like(canvas.written)
        written[:, :decided] = 1
        generators = [seeded_generator(seed) for seed in range(images)]
        drawn = _TrialRandomness.draw(generators, canvas.num_positions, job.device)
        known = {each.name: getattr(job, each.name) for each in dataclasses.fields(job)}
        known |= {
            "canvas": _TrialCanvas(canvas.tokens.clone(), written, canvas.fixed),
            "randomness": drawn,
            "schedule": Raster(decided + 1),
            "on_step": None,
            "sessions": [],
        }
        return cls(**known, decided=decided)

    def part(self, images: Sequence[int]) -> Self:
        """The trial itself: its images are in one batch, and what it starts again from must be the canvas in use."""
        return dataclasses.replace(self, sessions=[])

    def open_session(
        self,
        network: CausalNetwork | None = None,
        *,
        draft_slots: int = 0,
        visibility: Visibility = "encoded",
    ) -> CausalSession:
        session = super().open_session(network, draft_slots=draft_slots, visibility=visibility)
        session.assume_read(self.decided)
        return session

    def pass_seconds(self, accelerator: Accelerator[CausalJob]) -> float:
        """Seconds of a pass of a method that decides from left to right, with all that it does beside the pass:
        drafting, noise, verifying, the canvas."""
        compiled = self.transforms(self.network) is not None
        # the first step makes what is missing; a compiled pass is made, then recorded as a graph
        wanted = 1 + 2 * compiled + TIMED
        started = time.perf_counter()
        stamps: list[float] = []

        def on_step(step: Step) -> None:
            wait_for(self.device)
            stamps.append(time.perf_counter())
            if len(stamps) == wanted:
                raise _Enough

        with contextlib.suppress(_Enough):
            accelerator.run(dataclasses.replace(self, on_step=on_step, sessions=[]))
        taken = [end - start for start, end in pairwise(stamps)]
        return min(taken[-TIMED:], default=time.perf_counter() - started)
