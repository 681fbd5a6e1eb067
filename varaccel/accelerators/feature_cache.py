"""Feature caching: most passes read only what changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varaccel.accelerators.fewer_steps import MaskedAccelerator
from varaccel.engine.accelerator import register
from varaccel.engine.loop import decode
from varaccel.engine.options import check_flag, positive_integer, settle
from varaccel.hosts.masked.denoising import Sampler
from varaccel.hosts.masked.job import MaskedJob


@register
@dataclass(frozen=True)
class FeatureCache(MaskedAccelerator):
    """Reuse the features of unchanged tokens between iterations, in the manner of LazyMAR (arXiv 2503.12450).

    See `FeatureCacheSession` for what is kept and what is read. Approximate; exact with `refresh=1`.

    Attributes:
        refresh: the number of passes from one that reads everything to the next; 1 is plain decoding.
        keep_unconditional: let the other passes do without the unconditional rows of guidance.
        iterations, head_steps, head_sampler: see `MaskedAccelerator`.

    Raises:
        InputError: refresh below 1.
    """

    name: ClassVar[str] = "feature_cache"
    summary: ClassVar[str] = "most passes read only the tokens that changed"

    refresh: int = 4
    keep_unconditional: bool = True
    iterations: int | None = None
    head_steps: int | None = None
    head_sampler: Sampler | None = None

    @property
    def lossless(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(
            self,
            refresh=positive_integer("refresh", self.refresh),
            keep_unconditional=check_flag("keep_unconditional", self.keep_unconditional),
        )

    def run(self, job: MaskedJob) -> int:
        session = job.open_feature_cache_session(
            refresh=self.refresh, keep_unconditional=self.keep_unconditional, sampling=self.sampling(job)
        )
        return decode(session, job.canvas, self.schedule(job), job.randomness, job.on_step)
