"""Measurements on the job of a call: the network, compiled or not, with the call's guidance and filters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from varaccel.engine.accelerator import Accelerator
from varaccel.engine.job import Job
from varaccel.engine.pass_curve import Pass, PassCurve, measure_passes
from varaccel.evaluation.speed.peak_memory import PeakMemory
from varaccel.evaluation.speed.roofline import Work, WorkCounter
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.passes import causal_passes
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.masked.passes import masked_passes
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.hosts.next_scale.passes import scale_passes


@dataclass(frozen=True)
class Probe(Accelerator[Job]):
    """Hands the job of a call to `measure` instead of drawing; the call's images stay empty."""

    name: ClassVar[str] = "probe"
    job_type = Job
    summary: ClassVar[str] = "measures instead of drawing"

    measure: Callable[[Job], None]

    @property
    def lossless(self) -> bool:
        return False

    def run(self, job: Job) -> int:
        self.measure(job)
        return 1


@dataclass(frozen=True)
class MeasuredPasses:
    """What the passes of one number of images were found to take.

    Attributes:
        curve: seconds.
        works: what each pass asks of the device, by tokens; empty of a compiled network, which does no less.
        rows: of the network in every pass.
        peak_bytes: see `PeakMemory`.
    """

    curve: PassCurve
    works: dict[int, Work]
    rows: int
    peak_bytes: int | None


def job_passes(job: Job, tokens: Sequence[int]) -> Callable[[], Iterable[Pass]]:
    """The passes of a round on a job; next-scale models have sizes of their own.

    Raises:
        TypeError: another kind of job.
    """
    if isinstance(job, ScaleJob):
        return lambda: scale_passes(job)
    if isinstance(job, CausalJob):
        chains = causal_passes(job, tokens)
        return lambda: chains
    if isinstance(job, MaskedJob):
        groups = masked_passes(job, tokens)
        return lambda: groups
    raise TypeError(f"no passes are known of a {type(job).__name__}")


def pass_times(
    pipe: Any,
    prompts: Sequence[str | int],
    tokens: Sequence[int],
    *,
    rounds: int = 3,
    warmups: int = 1,
    **call: Any,
) -> MeasuredPasses:
    """Time passes of a pipeline over several numbers of tokens, see `measure_passes`.

    Args:
        prompts: one image of each.
        tokens: per pass and image.
        call: further arguments of the pipeline call.
    """
    found: list[MeasuredPasses] = []
    device, counted = pipe.transformer.device, not pipe.is_compiled

    def measure(job: Job) -> None:
        with PeakMemory(device) as memory:
            passes = job_passes(job, tokens)
            curve = measure_passes(passes, job.rows, device, rounds=rounds, warmups=warmups)
        works = {count: _work(run) for count, run in passes()} if counted else {}
        found.append(MeasuredPasses(curve, works, job.rows, memory.bytes))

    pipe(list(prompts), accelerator=Probe(measure), output_type="latent", seed=0, **call)
    return found[0]


def _work(run: Callable[[], object]) -> Work:
    with WorkCounter() as counter:
        run()
    return counter.work
