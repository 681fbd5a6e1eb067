"""SkipVAR: each image decides whether it needs the last scales, and guidance for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varaccel.accelerators.scale_plan import PlannedAccelerator, scale_count, scale_integer
from varaccel.engine.accelerator import register
from varaccel.engine.options import check_number, settle
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.hosts.next_scale.plan import SessionPlan
from varaccel.hosts.next_scale.planned import Course, Turn
from varaccel.hosts.next_scale.skipping import SkipRule


@register
@dataclass(frozen=True)
class SkipVAR(PlannedAccelerator):
    """Images of little detail end early or go on without guidance, in the manner of SkipVAR (arXiv 2506.08908).

    After some scales the share of high frequencies of each image's running feature map is measured, see
    `high_frequency_share`: an image with little of it has no last scales, one with more has no unconditional rows for
    them, the others go on as they are. These are thresholds; the published method asks a model that was trained to
    decide. What an image gets does not depend on the others of its batch. Approximate.

    Attributes:
        decision_scales: how many scales every image has, negative to count from the end; 9 of 13, as published, scaled
            to the model's if None.
        stop_below: images whose share is smaller end there; 0 ends none.
        unguided_below: of the others, those whose share is smaller go on without guidance; 0 leaves all guided.

    Raises:
        InputError: a threshold that is no share from 0 to 1.
    """

    name: ClassVar[str] = "skip_var"
    summary: ClassVar[str] = "images of little detail end early or lose their guidance"

    decision_scales: int | None = None
    stop_below: float = 0.2
    unguided_below: float = 0.4

    @property
    def lossless(self) -> bool:
        return self.stop_below == 0 and self.unguided_below == 0

    def __post_init__(self) -> None:
        if self.decision_scales is not None:
            settle(self, decision_scales=scale_integer("decision_scales", self.decision_scales))
        for name in ("stop_below", "unguided_below"):
            settle(self, **{name: check_number(name, getattr(self, name), most=1, off="0 = none")})

    def course(self, job: ScaleJob) -> Course:
        scales = job.num_scales
        published = max(1, round(9 / 13 * scales))
        count = (
            published
            if self.decision_scales is None
            else scale_count("decision_scales", self.decision_scales, scales)
        )
        if self.lossless or count == scales:
            return Course((Turn("draft"),), scales)
        rule = SkipRule(count - 1, self.stop_below, self.unguided_below)
        return Course((Turn("draft"),), scales, SessionPlan(skip=rule))
