"""ZipAR: rows of an image in parallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.loop import decode
from varaccel.engine.options import check_choice, positive_integer, settle
from varaccel.errors import InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.schedule import StaggeredGrids
from varaccel.nn.grid import line_ends

Mode = Literal["masked", "published"]


@register
@dataclass(frozen=True)
class ZipAR(Accelerator[CausalJob]):
    """Decode several rows at once, each a window behind the row above (He et al. 2024, arXiv 2412.04062).

    Training-free and approximate: a token does not see the right part of the rows above it that is not there
    yet. With `window` at least the row width it is raster decoding. Of an image of several grids, each is decoded so
    when the one before it is finished.

    Attributes:
        window: lag between rows in tokens, at least 1. Smaller is faster and further from the plain distribution.
        mode: "masked" starts every row early, W + (H - 1) * window passes, and hides empty slots from
            attention. "published" is the published code: the first row is finished before the second
            starts, 2 W + (H - 2) * window passes, and empty slots are visible with zero key and value.

    Raises:
        InputError: window below 1, or an unknown mode.
    """

    name: ClassVar[str] = "zipar"
    job_type = CausalJob
    summary: ClassVar[str] = "rows in parallel, each a window behind the row above"

    window: int = 8
    mode: Mode = "masked"

    @property
    def lossless(self) -> bool:
        return False

    def __post_init__(self) -> None:
        settle(self, window=positive_integer("ZipAR window", self.window))
        check_choice("ZipAR mode", self.mode, get_args(Mode))

    def run(self, job: CausalJob) -> int:
        published = self.mode == "published"
        schedule = StaggeredGrids(job.grids, self.window, first_row_alone=published)
        if any(
            grid.end_of_line is not None for grid in job.grids
        ):  # known ahead: read where they stand, never decided
            if job.canvas.fixed is None:
                raise InputError("ZipAR reads ends of line ahead; give them as fixed tokens of the canvas.")
            job.canvas.show_fixed(line_ends(job.grids, job.device) >= 0)
        session = job.open_session(visibility="causal" if published else "encoded")
        return decode(session, job.canvas, schedule, job.randomness, job.on_step)
