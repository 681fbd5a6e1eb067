"""Plain decoding: the reference that every speed-up is stated against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.job import Job
from varaccel.engine.loop import decode


@register
@dataclass(frozen=True)
class Plain(Accelerator):
    """No guesses, in the family's own order: the reference that every speed-up is stated against."""

    name: ClassVar[str] = "plain"
    hosts: ClassVar[tuple[str, ...]] = ("llamagen", "var", "mar")
    summary: ClassVar[str] = "one token per pass, in raster order"

    @property
    def lossless(self) -> bool:
        return True

    def run(self, job: Job) -> int:
        return decode(job.open_session(), job.canvas, job.schedule, job.randomness, job.on_step)
