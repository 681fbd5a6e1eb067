"""An accelerator of our own: the first rows token by token, all others in ZipAR's order.

python docs/examples/accelerator.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varaccel.accelerators import Accelerator, register
from varaccel.engine.job import Job
from varaccel.engine.loop import decode
from varaccel.engine.options import positive_integer
from varaccel.hosts.causal.schedule import Group, StaggeredRows


@dataclass(frozen=True)
class LateStagger(StaggeredRows):
    """Raster order for `rows` rows, then `window` columns between one row and the next."""

    rows: int = 1

    def groups(self, positions: int) -> list[Group]:
        start = min(self.rows * self.width, positions - self.width)
        groups = [Group((p,), (p - 1,)) for p in range(start)]
        for below in super().groups(positions - start):
            parts = (below.positions, below.sources, below.refresh)
            groups.append(Group(*(tuple(start + p for p in part) for part in parts)))
        return groups


@register
@dataclass(frozen=True)
class LateZipAR(Accelerator):
    """ZipAR that begins `rows` rows down the image; approximate, as ZipAR is."""

    name: ClassVar[str] = "late-zipar"
    hosts: ClassVar[tuple[str, ...]] = ("llamagen",)
    summary: ClassVar[str] = "the first rows token by token, then rows in parallel"

    rows: int = 4
    window: int = 4

    @property
    def lossless(self) -> bool:
        return False

    def __post_init__(self) -> None:
        positive_integer("late-zipar rows", self.rows)
        positive_integer("late-zipar window", self.window)

    def run(self, job: Job) -> int:
        order = LateStagger(job.grid_width, self.window, rows=self.rows)
        return decode(job.open_session(), job.canvas, order, job.randomness, job.on_step)


if __name__ == "__main__":
    from varaccel import AutoPipeline, ZipAR

    pipe = AutoPipeline.from_pretrained("mini-llamagen")
    for accelerator in (None, ZipAR(window=4), LateZipAR(rows=4, window=4)):
        print(pipe("a large green cone at sunset", seed=0, accelerator=accelerator).stats)
