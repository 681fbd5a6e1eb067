"""The accelerator for those who do not want to choose one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from varaccel.accelerators.fewer_steps import FewerSteps
from varaccel.accelerators.jacobi import Jacobi
from varaccel.accelerators.plain import Plain
from varaccel.accelerators.speculative import Speculative
from varaccel.accelerators.zipar import ZipAR
from varaccel.engine.accelerator import Accelerator, Plan, register
from varaccel.engine.balance import measure_balance
from varaccel.engine.counts import Counts
from varaccel.engine.job import Job
from varaccel.engine.network import Network
from varaccel.engine.options import check_choice
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.masked.job import MaskedJob
from varaccel.nn.processes import said_first

Quality = Literal["lossless", "approximate"]

WIDEST_WINDOW, LONGEST_CHAIN = 16, 5
"""The most that Jacobi decoding and a drafter draft: what is further ahead is hardly ever accepted."""

DRAFTER_SHARE = 0.1
"""The largest drafter that is chosen, as a share of the model's weights."""


def _weights(network: Network | nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.dim() > 1 and p.requires_grad)


@register
@dataclass(frozen=True)
class Auto(Accelerator[Job]):
    """As many tokens per pass as the machine reads in the time of one.

    A pass over n rows takes about max(weights / bandwidth, 2 n weights / arithmetic rate), so a device reads
    n = rate / (2 bandwidth), bytes per weight included, in the time of one: its free tokens, measured once
    per process. Divided by the rows of the call (images, times the branches of guidance) they are the tokens f per
    image that cost nothing.

    "lossless": below 2 free tokens one token per pass; else, if the model came with a drafter of at most a
    tenth of its weights (a larger one takes longer than it saves), a chain of f - 1 draft tokens, at most 5; else
    Jacobi decoding with a window of f, at most 16. All three draw with the Gumbel noise of each position and so
    give the same image for the same seed, on any machine and in any batch.
    "approximate": ZipAR with the window that keeps f rows in flight, but no less than half the row.

    Masked models with a diffusion head: no exact method is faster than plain decoding, so "lossless" is that, in as
    many iterations as the call says; "approximate" is what measured best at unchanged quality (docs/bench-mar.md), an
    eighth as many iterations as tokens.

    Next-scale models: plain decoding; what is faster needs a second model, which is for the user to choose.

    The statistics of a call name what was chosen.

    Attributes:
        quality: whether the distribution of plain decoding must be kept.

    Raises:
        InputError: an unknown quality.
    """

    name: ClassVar[str] = "auto"
    job_type = Job
    summary: ClassVar[str] = "chosen by hardware and batch size"

    quality: Quality = "lossless"

    def __post_init__(self) -> None:
        check_choice("quality", self.quality, get_args(Quality))

    @property
    def lossless(self) -> bool:
        return self.quality == "lossless"

    def plan(self, job: Job) -> Plan:
        if isinstance(job, CausalJob):
            return self._causal(job).plan(job)
        if isinstance(job, MaskedJob) and self.quality == "approximate":
            tokens = job.canvas.num_positions
            return FewerSteps(iterations=min(job.schedule.iterations, max(1, tokens // 8))).plan(job)
        return Plain().plan(job)

    def _causal(self, job: CausalJob) -> Accelerator[CausalJob]:
        measured = measure_balance(job.device, job.dtype).free_tokens
        # processes that hold one network together measure each for itself, and must choose alike
        free = max(1, int(said_first(job.network, measured) / job.rows))
        if self.quality == "approximate":
            width = max(grid.width for grid in job.grids)
            return ZipAR(window=max(width // 2, -(-width // free)))
        if free > 1:
            size = _weights(job.network)
            for name in ("eagle", "small"):
                if name in job.drafters and DRAFTER_SHARE * size >= _weights(job.drafters[name]):
                    tree = min(LONGEST_CHAIN, free - 1)
                    return Speculative(drafter=name, tree=tree, verification="gumbel")
        return Jacobi(window=min(WIDEST_WINDOW, free), coupling="gumbel")

    def run(self, job: Job) -> Counts:
        return self.plan(job).run()
