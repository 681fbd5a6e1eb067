"""A call of a model that decides whole scales, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from varaccel.engine.job import Job
from varaccel.engine.loop import decode
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.network import NextScaleNetwork
from varaccel.hosts.next_scale.plan import SessionPlan
from varaccel.hosts.next_scale.sampling import Sampling, ScaleGuidance
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.hosts.next_scale.session import ScaleSession
from varaccel.nn.condition import Condition


class Draws(Protocol):
    """A source of draws: `Randomness`, `PublishedDraws`, or another stream."""

    def sample(self, distribution: Any, positions: Tensor) -> Tensor:
        """Token ids [B, P] of `positions` drawn from their distribution."""
        ...

    def part(self, images: Sequence[int]) -> Self:
        """The draws of some images."""
        ...


@dataclass(frozen=True, kw_only=True)
class ScaleJob(Job):
    """What accelerators of next-scale models are given.

    Attributes:
        network: the host model.
        condition: of the B images; None for no condition.
        features: what the decided scales add up to, shared by all sessions.
        guidance, sampling: of the call.
        randomness: the draws of each image and position, or another stream.
        schedule: scale after scale.
        cache_dtype: number type of stored keys and values, the network's own if None.
    """

    network: NextScaleNetwork
    condition: Condition | None
    features: FeatureMap
    guidance: ScaleGuidance
    sampling: Sampling
    randomness: Draws
    schedule: Scales
    cache_dtype: torch.dtype | None = None

    @property
    def num_scales(self) -> int:
        return len(self.schedule.scales)

    @property
    def cache_bytes(self) -> int:
        # sessions follow each other, and each frees its cache before the next makes its own
        return max((session.cache_bytes for session in self.sessions), default=0)

    def _of_images(self, images: Sequence[int]) -> dict[str, Any]:
        return {
            "condition": None if self.condition is None else self.condition.part(images),
            "features": self.features.part(images),
            "randomness": self.randomness.part(images),
        }

    def open_session(
        self,
        network: NextScaleNetwork | None = None,
        *,
        guidance: ScaleGuidance | None = None,
        sampling: Sampling | None = None,
        until: int | None = None,
        plan: SessionPlan | None = None,
    ) -> ScaleSession:
        """A session of the host model, or of another network of the same signature.

        Args:
            guidance, sampling: the call's if None.
            until, plan: see `ScaleSession`.

        Raises:
            InputError: sampling that does not fit the model.
        """
        if sampling is not None:
            sampling.check(self.schedule.scales)
        chosen = self.network if network is None else network
        session = ScaleSession(
            chosen,
            self.features,
            self.condition,
            guidance=guidance or self.guidance,
            sampling=sampling or self.sampling,
            until=until,
            plan=plan,
            cache_dtype=self.cache_dtype,
            transform=self.transforms(chosen),
        )
        self.sessions.append(session)
        return session

    def decode(self) -> int:
        return decode(self.open_session(), self.canvas, self.schedule, self.randomness, self.on_step)
