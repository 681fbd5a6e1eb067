"""FastVAR: the last scales are left out, and those before them run on the tokens that carry detail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from varaccel.accelerators.scale_plan import PlannedAccelerator, ScalePlan
from varaccel.engine.accelerator import register
from varaccel.engine.options import check_integer, settle
from varaccel.errors import InputError
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.hosts.next_scale.planned import Course

LONG_SCHEDULE = 13
"""Scales of the model whose last two the published code leaves out; with fewer, each says more."""

PUBLISHED_KEEP = (0.6, 0.5)
"""Shares of tokens that run at the pruned scales of the published code for Infinity."""

PUBLISHED_BLOCKS = (3 / 32, 28 / 32)
"""Where the pruned blocks of the published code start and end, as shares of the depth."""


@register
@dataclass(frozen=True)
class FastVAR(PlannedAccelerator):
    """Cached token pruning (Guo et al. 2025, arXiv 2503.23367), with scales counted from the end.

    The published code knows its scales by their width and so works on square images of one size. Here the last
    `skip_scales` are left out, the ones before them are pruned, and the scale before those is the cached one, whatever
    the aspect ratio. At 13 scales, 32 blocks and the defaults this is the published method. Approximate.

    Attributes:
        keep: shares of tokens that run at the pruned scales, coarse to fine; (0.6, 0.5), as published, if None.
        skip_scales: how many of the last scales are left out; if None, 2 of at least 13, else none.
        blocks: first pruned block and the end, as in a slice; 3 and 28 of 32, scaled to the depth, if None.

    Raises:
        InputError: no share above 0 to 1.
    """

    name: ClassVar[str] = "fast_var"
    summary: ClassVar[str] = "late scales run on the tokens that carry detail, the last not at all"

    keep: tuple[float, ...] | None = None
    skip_scales: int | None = None
    blocks: tuple[int | None, int | None] | None = None

    @property
    def lossless(self) -> bool:
        return self.keep is not None and min(self.keep) == 1 and self.skip_scales == 0

    def __post_init__(self) -> None:
        if self.skip_scales is not None:
            settle(self, skip_scales=check_integer("skip_scales", self.skip_scales, least=0, off="0 = none"))
        if self.keep is not None:
            shares = tuple(self.keep) if isinstance(self.keep, (list, tuple)) else (self.keep,)
            if not shares:
                raise InputError("keep must have one share at least; plain decoding prunes nothing.")
            ScalePlan(keep=tuple(enumerate(shares)))  # refuses what is no share
            settle(self, keep=shares)
        settle(self, blocks=ScalePlan(blocks=self.blocks).blocks)

    def course(self, job: ScaleJob) -> Course:
        return self.scale_plan(job).course(job)

    def scale_plan(self, job: ScaleJob) -> ScalePlan:
        """The plan of a call. Where a model has too few scales, the coarsest of the pruned ones are not."""
        scales = job.num_scales
        skipped = (2 if scales >= LONG_SCHEDULE else 0) if self.skip_scales is None else self.skip_scales
        if skipped >= scales:
            raise InputError(f"skip_scales must be less than the model's {scales} scales, got {skipped}.")
        stop = scales - skipped
        keep = PUBLISHED_KEEP if self.keep is None else self.keep
        shares = keep[-(stop - 1) :] if stop > 1 else ()
        network: Any = job.network
        depth = len(network.blocks)
        start, end = (round(share * depth) for share in PUBLISHED_BLOCKS)
        return ScalePlan(
            keep=tuple((stop - len(shares) + k, share) for k, share in enumerate(shares)),
            blocks=(start, max(end, start + 1)) if self.blocks is None else self.blocks,
            stop=stop,
        )
