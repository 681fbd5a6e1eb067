"""The course of a call of which a plan says what each scale costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from varaccel.engine.counts import StageStats
from varaccel.engine.loop import decode
from varaccel.hosts.next_scale.job import Draws, ScaleJob
from varaccel.hosts.next_scale.network import NextScaleNetwork
from varaccel.hosts.next_scale.plan import SessionPlan
from varaccel.hosts.next_scale.relay import Leg, Relay
from varaccel.hosts.next_scale.sampling import Sampling, ScaleGuidance
from varaccel.hosts.next_scale.session import ScaleSession
from varaccel.nn.scale_schedule import NO_TOKEN


@dataclass(frozen=True)
class Turn:
    """What one network does of a call.

    Attributes:
        name: what the stage is called.
        start: its first scale.
        network: None for the host model.
        guidance, sampling: None for those of the call.
    """

    name: str
    start: int = 0
    network: NextScaleNetwork | None = None
    guidance: ScaleGuidance | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Course:
    """What each scale of a call costs.

    Attributes:
        turns: of the networks, by their first scale.
        stop: number of scales that are decided; the others are left out.
        plan: what the passes of every network leave out.
    """

    turns: tuple[Turn, ...]
    stop: int
    plan: SessionPlan = field(default_factory=SessionPlan)

    def is_plain(self, job: ScaleJob) -> bool:
        """Whether this is plain decoding of a job."""
        return len(self.turns) == 1 and self.stop == job.num_scales and self.plan == SessionPlan()

    def run(self, job: ScaleJob) -> StageStats:
        """Fill the canvas of a job.

        Returns:
            passes, and, of several networks, what each did.
        """
        ends = [turn.start for turn in self.turns[1:]] + [self.stop]
        legs = [self._leg(job, turn, end) for turn, end in zip(self.turns, ends, strict=True)]
        relay = Relay(legs, job.device)
        schedule = dataclasses.replace(job.schedule, stop=self.stop)
        steps = decode(relay, job.canvas, schedule, _DrawsOfSome(job.randomness, relay), job.on_step)
        relay.finish()
        borders = job.schedule.scales.borders
        left = torch.arange(borders[self.stop], job.canvas.num_positions, device=job.device)
        job.canvas.write(left, left.new_full((job.canvas.batch, len(left)), NO_TOKEN), steps)
        stages = tuple(relay.stages) if len(legs) > 1 else ()
        return StageStats(sum(stage.passes for stage in relay.stages), stages)

    def _leg(self, job: ScaleJob, turn: Turn, end: int) -> Leg:
        plan = self.plan if end == self.stop else dataclasses.replace(self.plan, together=1)

        def open_session() -> ScaleSession:
            return job.open_session(
                turn.network, guidance=turn.guidance, sampling=turn.sampling, until=end, plan=plan
            )

        return Leg(turn.name, turn.start, open_session)


@dataclass(frozen=True)
class _DrawsOfSome:
    """The draws of a call, of which images that have ended get no tokens.

    Attributes:
        randomness: of the call.
        relay: knows which images have ended.
    """

    randomness: Draws
    relay: Relay

    def sample(self, distribution: Any, positions: Tensor) -> Tensor:
        ended = self.relay.ended
        if distribution is None:
            assert ended is not None
            return positions.new_full((len(ended), len(positions)), NO_TOKEN)
        tokens = self.randomness.sample(distribution, positions)
        return tokens if ended is None else tokens.masked_fill(ended.unsqueeze(1), NO_TOKEN)
