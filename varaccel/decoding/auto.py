"""The accelerator for those who do not want to choose one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from varaccel.decoding.accelerator import Accelerator, Job, register
from varaccel.decoding.balance import measure_balance
from varaccel.decoding.jacobi import Jacobi
from varaccel.decoding.options import check_choice
from varaccel.decoding.statistics import Tally
from varaccel.decoding.zipar import ZipAR

Quality = Literal["lossless", "approximate"]

MOST_GUESSES = 16
"""The largest Jacobi window that is chosen: what is guessed further ahead hardly ever holds."""


@register
@dataclass(frozen=True)
class Auto(Accelerator):
    """As many tokens per pass as the machine reads in the time of one.

    A pass over n rows takes about max(weights / bandwidth, 2 n weights / arithmetic rate), so a device reads
    n = rate / (2 bandwidth), bytes per weight included, in the time of one: its free tokens, measured once
    per process. Divided by the rows of the call (pictures, times two if guided) they are the tokens f per
    picture that cost nothing.

    "lossless" takes Gumbel-coupled Jacobi decoding with a window of f tokens, from 1 to 16. Its pictures do
    not depend on the window, so a seed gives the same picture on any machine and in any batch.
    "approximate" takes ZipAR with the window that keeps f rows in flight, but no less than half the row.

    The statistics of a call name what was chosen.

    Attributes:
        quality: whether the law of plain decoding must be kept.

    Raises:
        InputError: an unknown quality.
    """

    name: ClassVar[str] = "auto"
    lossless: ClassVar[bool] = True
    hosts: ClassVar[tuple[str, ...]] = ("llamagen",)
    summary: ClassVar[str] = "chosen by hardware and batch size"

    quality: Quality = "lossless"

    def __post_init__(self) -> None:
        check_choice("quality", self.quality, get_args(Quality))

    @property
    def keeps_law(self) -> bool:
        return self.quality == "lossless"

    def resolve(self, job: Job) -> Accelerator:
        free = measure_balance(job.device, job.dtype).free_tokens / job.rows
        if self.quality == "lossless":
            return Jacobi(window=max(1, min(MOST_GUESSES, int(free))))
        width = job.grid_width
        return ZipAR(window=max(width // 2, -(-width // max(1, int(free)))))

    def run(self, job: Job) -> int | Tally:
        return self.resolve(job).run(job)
