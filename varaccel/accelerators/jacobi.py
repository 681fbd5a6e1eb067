"""Speculative Jacobi decoding: the model's own last answers are the draft tokens of the next pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.loop import decode
from varaccel.engine.options import check_choice, check_row_window, positive_integer, settle
from varaccel.engine.randomness import RasterNoise
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.schedule import Raster
from varaccel.speculation.batch import Speculation
from varaccel.speculation.jacobi_proposer import Coupling, Fill, JacobiProposer
from varaccel.speculation.loop import speculate, verify_by
from varaccel.speculation.rejection import Exact
from varaccel.speculation.step import Verifier


@register
@dataclass(frozen=True)
class Jacobi(Accelerator[CausalJob]):
    """Draft a window of tokens with the model's own answers of the last pass (Teng et al. 2024, arXiv 2410.01699).

    Training-free and lossless for every coupling: images follow the distribution of plain decoding. In each pass the
    model answers for all positions of the window; draft tokens are accepted from the left, and the answers
    beyond the first rejection become the draft tokens of the next pass.

    Attributes:
        window: tokens read per pass, at least 1 (1 is plain decoding).
        coupling: how the answer at a position depends on the draft token that stands there. "none": drawn
            afresh (the published method). "maximal": the draft token stays with probability min(1, p / q), else
            the residual is drawn from (maximal coupling). "gumbel": drawn with Gumbel noise that belongs to the
            position, so that equal distributions give equal tokens; the image does not depend on the window. Coupled
            draft tokens change less from pass to pass, so what was drafted after them is accepted more often.
        fill: draft tokens for positions that enter the window: the token to the left, the token above, or a
            random one.
        row_window: decode rows in parallel with this lag between them, as `ZipAR` does, each row in flight with a
            Jacobi window of its own; the distribution is then ZipAR's, which is approximate. None for raster order.

    Raises:
        InputError: window below 1, or an unknown coupling, fill or row_window.
    """

    name: ClassVar[str] = "jacobi"
    job_type = CausalJob
    summary: ClassVar[str] = "the model's own last answers as draft tokens; training-free"

    window: int = 16
    coupling: Coupling = "gumbel"
    fill: Fill = "above"
    row_window: int | None = None

    def __post_init__(self) -> None:
        settle(self, window=positive_integer("Jacobi window", self.window))
        check_choice("Jacobi coupling", self.coupling, get_args(Coupling))
        check_choice("Jacobi fill", self.fill, get_args(Fill))
        settle(self, row_window=check_row_window(self.row_window))

    @property
    def continuous(self) -> bool:
        """A window of one token whose noise belongs to its position is plain decoding: all images keep step."""
        return self.window > 1 or self.coupling != "gumbel" or self.row_window is not None

    @property
    def lossless(self) -> bool:
        return self.row_window is None

    def run(self, job: CausalJob) -> SpeculationStats:
        return speculate(job, self._start) if self.continuous else _one_by_one(job)

    def _start(self, job: CausalJob) -> Speculation:
        lanes = job.lanes(self.row_window)
        window = min(self.window, lanes.width)
        most = lanes.most_open(job.canvas.num_positions)
        session = job.open_session(draft_slots=most * (window - 1))
        noise = job.randomness.gumbel(job.vocab_size) if self.coupling == "gumbel" else None
        proposer = JacobiProposer(job, lanes, window, self.coupling, self.fill, noise)
        verify: Verifier = verify_by(Exact()) if noise is None else proposer.verify_by_noise
        return Speculation(session, lanes, proposer, verify, noise)


def _one_by_one(job: CausalJob) -> SpeculationStats:
    """A window of one token drafts and verifies nothing: the plain loop, with the same noise and so the same image."""
    session = job.open_session()
    draws = RasterNoise(job.randomness.gumbel(job.vocab_size), job.randomness)
    order = job.schedule if isinstance(job.schedule, Raster) else Raster()
    passes = decode(session, job.canvas, order, draws, job.on_step)
    stats = SpeculationStats.start(job.canvas.batch, job.device)
    stats.passes += passes
    stats.attempts += passes - 1
    return stats
