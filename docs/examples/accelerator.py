"""An accelerator of our own: the first rows token by token, all others in ZipAR's order."""

from dataclasses import dataclass

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.loop import decode
from varaccel.engine.options import positive_integer
from varaccel.hosts.causal.job import CausalJob
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
class LateZipAR(Accelerator[CausalJob]):
    """ZipAR that begins `rows` rows down the image; approximate, as ZipAR is."""

    name = "late-zipar"
    job_type = CausalJob
    summary = "the first rows token by token, then rows in parallel"

    rows: int = 4
    window: int = 4

    @property
    def lossless(self) -> bool:
        return False

    def __post_init__(self) -> None:
        positive_integer("late-zipar rows", self.rows)
        positive_integer("late-zipar window", self.window)

    def run(self, job: CausalJob) -> int:
        schedule = LateStagger(job.grid.pitch, self.window, rows=self.rows)
        return decode(job.open_session(), job.canvas, schedule, job.randomness, job.on_step)


if __name__ == "__main__":
    from varaccel import AutoPipeline

    pipe = AutoPipeline.from_pretrained("mini-llamagen")
    print(pipe("a large green cone at sunset", seed=0, accelerator=LateZipAR(rows=4, window=4)).stats)
