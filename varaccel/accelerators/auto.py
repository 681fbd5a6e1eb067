"""The accelerator for those who do not want to choose one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, get_args
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from varaccel.accelerators.code import CoDe
from varaccel.accelerators.fewer_steps import FewerSteps
from varaccel.accelerators.jacobi import Jacobi
from varaccel.accelerators.plain import Plain
from varaccel.accelerators.speculative import Speculative
from varaccel.accelerators.trial import TrialJob
from varaccel.accelerators.zipar import ZipAR
from varaccel.engine.accelerator import Accelerator, Plan, plan_call, register
from varaccel.engine.counts import Counts
from varaccel.engine.job import Job
from varaccel.engine.network import Network
from varaccel.engine.options import check_choice
from varaccel.engine.pass_curve import PassCurve
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.nn.processes import said_first

Quality = Literal["lossless", "approximate"]

TOKENS_PER_PASS = {
    "jacobi": {1: (1.0, 1.0), 2: (1.36, 1.28), 4: (1.85, 1.67), 8: (2.48, 2.12), 16: (3.4, 2.71)},
    "eagle": {3: (2.58, 1.75), 5: (3.03, 1.86)},
}
"""Tokens per pass of one image, and of the slowest of eight, by the window of Jacobi decoding and the chain of a
drafter, all with Gumbel noise: 256 tokens over the passes of mini-llamagen in docs/acceptance.json. A small model that
drafts is taken to be as good as an EAGLE head, and other models as easy to draft for as this one."""

MEASURED_WINDOWS = (1, 4, 16)
"""Windows whose passes are timed; what lies between is taken from the line between them."""

GAIN = 1.1
"""How much faster than one token per pass a method must be expected to be. Less than that is within what prompts and a
machine with other work change."""

DRAFTER_SHARE = 0.1
"""The largest drafter that is tried, as a share of the model's weights: larger ones took longer than they saved
wherever they were measured (docs/bench.json), and trying them takes time too."""

REFINER_SHARE = 0.5
"""The largest refiner that is chosen, as a share of the model's weights."""

_TIMES: WeakKeyDictionary[nn.Module | Network, dict[object, float]] = WeakKeyDictionary()


def _weights(network: Network | nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.dim() > 1 and p.requires_grad)


def _tokens_per_pass(method: str, length: int, images: int) -> float:
    """What was recorded; between one image and eight by the logarithm of their number, beyond eight as of eight."""
    one, eight = TOKENS_PER_PASS[method][length]
    return one + (eight - one) * min(1.0, (images - 1).bit_length() / 3)


def pass_seconds(trial: TrialJob, accelerator: Accelerator[CausalJob]) -> float:
    """Seconds of a pass of a method, measured; see `TrialJob.pass_seconds`."""
    return trial.pass_seconds(accelerator)


class PassTimes:
    """What passes of a call take with one method and another: measured once per network, size of call and device.

    Args:
        job: the call, of which measuring changes nothing.
    """

    def __init__(self, job: CausalJob) -> None:
        self.job = job
        self._trial = cache(lambda: TrialJob.of(job))

    def seconds(self, accelerator: Accelerator[CausalJob], drafter: nn.Module | None = None) -> float:
        """Seconds of a pass of the model with all that belongs to it.

        Processes that hold one network together measure together, and all go by what the first of them found.

        Args:
            drafter: the network that drafts, if one does.
        """
        job = self.job
        key = (
            accelerator,
            None if drafter is None else ref(drafter),
            (job.canvas.batch, job.rows, job.canvas.num_positions),
            (job.dtype, job.device, job.transforms(job.network) is not None, torch.get_num_threads()),
        )
        known = _TIMES.setdefault(job.network, {})
        if key not in known:
            known[key] = said_first(job.network, pass_seconds(self._trial(), accelerator))
        return known[key]

    def window_seconds(self, *windows: int) -> PassCurve:
        """Seconds of passes of Jacobi decoding by their window."""
        return PassCurve(
            {(window, self.job.rows): self.seconds(Jacobi(window, coupling="gumbel")) for window in windows}
        )


@register
@dataclass(frozen=True)
class Auto(Accelerator[Job]):
    """What is expected to be fastest on this machine, for this model and this number of images.

    Causal models, "lossless": in the first call of its size a few passes of Jacobi decoding, windows of 1, 4 and 16
    tokens, are timed, drafting, noise and verification included, and of the model's drafter if it is at most a tenth of
    the model (a larger one takes longer than it saves). The time of a pass over the tokens that it decides, as recorded
    for the shipped model, is the time per token, and the least is chosen, if it is at least 10 % less than that of
    one token per pass. All choices draw with the Gumbel noise of each position and so give the same image for
    the same seed, on any machine and in any batch.
    "approximate": ZipAR with a window of half the row if passes over two rows take little enough longer than those over
    one, else of the whole row, which is raster order.

    Masked models with a diffusion head: no exact method is faster than plain decoding, so "lossless" is that, in as
    many iterations as the call says; "approximate" is what measured best at unchanged quality (docs/bench-mar.md), an
    eighth as many iterations as tokens. Nothing is timed for either: passes over fewer, larger groups are always fewer.

    Next-scale models: each pass decides a whole scale, and no exact method decides several, so "lossless" is plain
    decoding; "approximate" is `CoDe` if the model came with a refiner of at most half its weights, whose passes are
    then faster on any machine, else plain decoding as well.

    The statistics of a call name what was chosen.

    Attributes:
        quality: whether the distribution of plain decoding must be kept.

    Raises:
        InputError: an unknown quality.
    """

    name: ClassVar[str] = "auto"
    job_type = Job
    summary: ClassVar[str] = "chosen by measured passes"

    quality: Quality = "lossless"

    def __post_init__(self) -> None:
        check_choice("quality", self.quality, get_args(Quality))

    @property
    def lossless(self) -> bool:
        return self.quality == "lossless"

    def plan(self, job: Job) -> Plan:
        if isinstance(job, CausalJob):
            at_once = job if job.batch_size is None else job.part(range(job.at_once))
            times = PassTimes(at_once)
            return (_fastest(at_once, times) if self.lossless else _rows(at_once, times)).plan(job)
        if self.lossless:
            return Plain().plan(job)
        if isinstance(job, MaskedJob):
            tokens = job.canvas.num_positions
            return FewerSteps(iterations=min(job.schedule.iterations, max(1, tokens // 8))).plan(job)
        refiner = job.drafters.get("refiner") if isinstance(job, ScaleJob) else None
        if refiner is not None and _weights(refiner) <= REFINER_SHARE * _weights(job.network):
            return plan_call(CoDe(), job)
        return Plain().plan(job)

    def run(self, job: Job) -> Counts:
        return self.plan(job).run()


def _fastest(job: CausalJob, times: PassTimes) -> Accelerator[CausalJob]:
    """The exact method with the least expected time per token; all of them draw one image."""
    images, rows = job.canvas.batch, job.rows
    curve = times.window_seconds(MEASURED_WINDOWS[0])
    one = Jacobi(window=1, coupling="gumbel")
    limit = curve.at(1, rows) / GAIN
    expected: dict[Accelerator[CausalJob], float] = {}

    def may_gain(method: str, length: int, tokens: int) -> bool:
        """Whether passes over so many tokens would be fast enough if they took no longer than the line so far says."""
        return curve.at(tokens, rows) < limit * _tokens_per_pass(method, length, images)

    # the window that decides most bounds what is possible: larger passes take no less time than smaller ones
    for window in MEASURED_WINDOWS[1:]:
        if may_gain("jacobi", MEASURED_WINDOWS[-1], min(window, curve.tokens(rows)[-1])):
            curve |= times.window_seconds(window)
    for window in TOKENS_PER_PASS["jacobi"]:
        if window <= curve.tokens(rows)[-1]:
            accelerator = Jacobi(window=window, coupling="gumbel")
            expected[accelerator] = curve.at(window, rows) / _tokens_per_pass("jacobi", window, images)
    size = _weights(job.network)
    for name in ("eagle", "small"):
        if name not in job.drafters or DRAFTER_SHARE * size < _weights(job.drafters[name]):
            continue
        for length in TOKENS_PER_PASS["eagle"]:
            if may_gain("eagle", length, length + 1):
                chain = Speculative(drafter=name, tree=length, verification="gumbel")
                seconds = times.seconds(chain, job.drafters[name])
                expected[chain] = seconds / _tokens_per_pass("eagle", length, images)
    best = min(expected, key=expected.__getitem__, default=one)
    return best if best in expected and expected[best] <= limit else one


def _rows(job: CausalJob, times: PassTimes) -> ZipAR:
    """ZipAR with two rows in flight if that is faster than one, else with a window of the row."""
    width = max(grid.width for grid in job.grids)
    half = max(1, width // 2)
    seconds = times.window_seconds(1, 2)
    passes = sum(grid.width + (grid.height - 1) * min(half, grid.width) for grid in job.grids)
    in_flight = -(-width // half)
    fast = seconds.call_seconds(passes, in_flight, job.rows)
    slow = seconds.call_seconds(job.canvas.num_positions, 1, job.rows)
    return ZipAR(window=half if fast * GAIN <= slow else width)
