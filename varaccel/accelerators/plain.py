"""Plain decoding: the reference that every speed-up is stated against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.job import Job


@register
@dataclass(frozen=True)
class Plain(Accelerator[Job]):
    """No draft tokens, in the family's own schedule: the reference that every speed-up is stated against."""

    name: ClassVar[str] = "plain"
    job_type = Job
    summary: ClassVar[str] = "one token per pass, in raster order"

    @property
    def lossless(self) -> bool:
        return True

    def run(self, job: Job) -> int:
        return job.decode()
