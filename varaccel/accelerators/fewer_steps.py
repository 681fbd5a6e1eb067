"""Fewer iterations and fewer denoising steps: what every other accelerator of masked models has to beat."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.job import Job
from varaccel.engine.loop import decode
from varaccel.engine.options import check_choice, positive_integer
from varaccel.hosts.masked.denoising import Sampler
from varaccel.hosts.masked.schedule import CosineGroups


class MaskedAccelerator(Accelerator):
    """What accelerators of masked models with a diffusion head share. Each has these fields among its own:

    Attributes:
        iterations: in how many groups tokens are decided; as in the call if None.
        head_steps, head_sampler: see `HeadSampling`; as in the call if None.

    Raises:
        InputError: a value that nothing can be drawn with.
    """

    hosts: ClassVar[tuple[str, ...]] = ("mar",)

    iterations: int | None
    head_steps: int | None
    head_sampler: Sampler | None

    def __post_init__(self) -> None:
        for name in ("iterations", "head_steps"):
            if getattr(self, name) is not None:
                positive_integer(name, getattr(self, name))
        if self.head_sampler is not None:
            check_choice("head_sampler", self.head_sampler, get_args(Sampler))

    def order(self, job: Job) -> CosineGroups:
        """The call's order in as many groups as asked for."""
        assert isinstance(job.schedule, CosineGroups)
        if self.iterations is None:
            return job.schedule
        return dataclasses.replace(job.schedule, iterations=self.iterations)

    def session_options(self) -> dict[str, Any]:
        """What sessions are opened with."""
        return {"head_steps": self.head_steps, "head_sampler": self.head_sampler}


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

    def run(self, job: Job) -> int:
        session = job.open_session(**self.session_options())
        return decode(session, job.canvas, self.order(job), job.randomness, job.on_step)
