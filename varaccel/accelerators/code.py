"""Collaborative decoding (CoDe): a large model draws the coarse scales, a small one the fine scales."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from varaccel.accelerators.plain import Plain
from varaccel.accelerators.scale_plan import PlannedAccelerator, resolve_refiner
from varaccel.engine.accelerator import Accelerator, Plan, register
from varaccel.engine.loop import decode
from varaccel.engine.options import positive_integer, settle
from varaccel.errors import InputError
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.hosts.next_scale.planned import Course, Turn
from varaccel.hosts.next_scale.sampling import Sampling, ScaleGuidance


@register
@dataclass(frozen=True)
class CoDe(PlannedAccelerator):
    """The model draws the first scales, a smaller one the rest (Chen et al. 2024, arXiv 2411.17787).

    Training-free with any two models of the same image tokenizer; better with a refiner trained for the scales
    that it draws. Approximate: the fine scales follow the small model's distribution. Most of the time and of
    the cache goes into the fine scales, and they say little that the coarse ones have not decided.

    The model's cache holds only the scales that it draws and is freed at the hand-over. The refiner reads what is
    drawn in one pass, without an output layer and without draws for it; both exist in the published code, where
    they change nothing but the random stream.

    Attributes:
        refiner: the small model: a `VARTransformer`, a pipeline that has one, or the name of such a pipeline as
            `AutoPipeline` takes it; None for the one that came with the model.
        draft_scales: how many scales the large model draws, 1 to S; S is plain decoding. About 80 % of the scales
            if None.
        refiner_guidance_scale, refiner_top_k, refiner_top_p, refiner_temperature: of the refined scales; as in the
            call if None.

    Raises:
        InputError: draft_scales below 1.
    """

    name: ClassVar[str] = "code"
    summary: ClassVar[str] = "coarse scales by the model, fine ones by a smaller model"

    refiner: object = None
    draft_scales: int | None = None
    refiner_guidance_scale: float | None = None
    refiner_top_k: int | None = None
    refiner_top_p: float | None = None
    refiner_temperature: float | None = None

    @property
    def lossless(self) -> bool:
        return False

    def __post_init__(self) -> None:
        if self.draft_scales is not None:
            settle(self, draft_scales=positive_integer("draft_scales", self.draft_scales))

    def plan(self, job: ScaleJob) -> Plan:
        """With the number of scales that the large model draws; plain decoding if these are all."""
        count = self._count(job)
        if count == job.num_scales:
            return Plain().plan(job)
        chosen = dataclasses.replace(self, draft_scales=count)
        return Plan(chosen, lambda: chosen.run(job))

    def course(self, job: ScaleJob) -> Course:
        count = self._count(job)
        turns = [Turn("draft")]
        if count < job.num_scales:
            refiner = resolve_refiner(self.refiner, job)
            guidance, sampling = self._refiner_guidance(job), self._refiner_sampling(job)
            turns.append(Turn("refine", count, refiner, guidance, sampling))
        return Course(tuple(turns), job.num_scales)

    def _count(self, job: ScaleJob) -> int:
        scales = job.num_scales
        count = self.draft_scales or max(1, min(scales - 1, round(0.8 * scales)))
        if count > scales:
            raise InputError(f"draft_scales must be from 1 to the model's {scales} scales, got {count}.")
        return count

    def _refiner_guidance(self, job: ScaleJob) -> ScaleGuidance | None:
        scale = self.refiner_guidance_scale
        return None if scale is None else dataclasses.replace(job.guidance, scale=scale)

    def _refiner_sampling(self, job: ScaleJob) -> Sampling | None:
        """The call's sampling with what was asked for; None if nothing was."""
        names = ("temperature", "top_k", "top_p")
        given = {n: v for n in names if (v := getattr(self, f"refiner_{n}")) is not None}
        return dataclasses.replace(cast("Any", job.sampling), **given) if given else None


@register
@dataclass(frozen=True)
class Refiner(Accelerator[ScaleJob]):
    """The small model draws all scales: the other end of what CoDe trades.

    Attributes:
        refiner: as in `CoDe`.
    """

    name: ClassVar[str] = "refiner"
    job_type = ScaleJob
    summary: ClassVar[str] = "all scales by the smaller model, to compare CoDe with"

    refiner: object = None

    @property
    def lossless(self) -> bool:
        return False

    def run(self, job: ScaleJob) -> int:
        session = job.open_session(resolve_refiner(self.refiner, job))
        return decode(session, job.canvas, job.schedule, job.randomness, job.on_step)
