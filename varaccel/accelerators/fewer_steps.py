"""Fewer iterations and fewer denoising steps: what every other accelerator of masked models has to beat."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, get_args

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.loop import decode
from varaccel.engine.options import check_choice, positive_integer, settle
from varaccel.hosts.masked.denoising import HeadSampling, Sampler
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.masked.schedule import CosineGroups


class MaskedAccelerator(Accelerator[MaskedJob]):
    """What accelerators of masked models with a diffusion head share. Each has these fields among its own:

    Attributes:
        iterations: in how many groups tokens are decided; as in the call if None.
        head_steps, head_sampler: see `HeadSampling`; as in the call if None.

    Raises:
        InputError: a value that nothing can be drawn with.
    """

    job_type = MaskedJob

    iterations: int | None
    head_steps: int | None
    head_sampler: Sampler | None

    def __post_init__(self) -> None:
        for name in ("iterations", "head_steps"):
            if getattr(self, name) is not None:
                settle(self, **{name: positive_integer(name, getattr(self, name))})
        if self.head_sampler is not None:
            check_choice("head_sampler", self.head_sampler, get_args(Sampler))

    def schedule(self, job: MaskedJob) -> CosineGroups:
        """The call's groups, in as many iterations as asked for."""
        if self.iterations is None:
            return job.schedule
        return dataclasses.replace(job.schedule, iterations=self.iterations)

    def sampling(self, job: MaskedJob, *, final_noise: bool | None = None) -> HeadSampling:
        """The call's sampling of the head, with what was asked for in its place."""
        own = job.sampling
        return dataclasses.replace(
            own,
            steps=own.steps if self.head_steps is None else self.head_steps,
            sampler=own.sampler if self.head_sampler is None else self.head_sampler,
            final_noise=own.final_noise if final_noise is None else final_noise,
        )


@register
@dataclass(frozen=True)
class FewerSteps(MaskedAccelerator):
    """Plain decoding in fewer passes, or with fewer steps of the diffusion head. Approximate, and no method at all.

    Tokens of one group are drawn independently of each other, so fewer groups lose what they have to do with each
    other. Fewer denoising steps draw from another distribution than the head was trained for.

    Attributes:
        iterations, head_steps, head_sampler: see `MaskedAccelerator`.
    """

    name: ClassVar[str] = "fewer_steps"
    summary: ClassVar[str] = "plain decoding with fewer iterations or denoising steps"

    iterations: int | None = None
    head_steps: int | None = None
    head_sampler: Sampler | None = None

    @property
    def lossless(self) -> bool:
        return False

    def run(self, job: MaskedJob) -> int:
        session = job.open_session(sampling=self.sampling(job))
        return decode(session, job.canvas, self.schedule(job), job.randomness, job.on_step)
