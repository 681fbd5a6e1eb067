"""A call of a model that decides whole scales, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from varaccel.engine.distribution import Categorical
from varaccel.engine.job import Job
from varaccel.engine.loop import DrawsTokens, decode
from varaccel.engine.randomness import Randomness
from varaccel.errors import InputError
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.published_rng import ONE_BATCH
from varaccel.hosts.next_scale.sampling import ScaleGuidance, ScaleSampling
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.hosts.next_scale.session import ScaleSession
from varaccel.models.var import VARTransformer
from varaccel.nn.condition import Condition


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

    network: VARTransformer
    condition: Condition | None
    features: FeatureMap
    guidance: ScaleGuidance
    sampling: ScaleSampling
    randomness: DrawsTokens[Categorical]
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
        if not isinstance(self.randomness, Randomness):
            raise InputError(ONE_BATCH)
        return {
            "condition": None if self.condition is None else self.condition.part(images),
            "features": self.features.part(images),
            "randomness": self.randomness.part(images),
        }

    def open_session(
        self,
        network: VARTransformer | None = None,
        *,
        guidance: ScaleGuidance | None = None,
        sampling: ScaleSampling | None = None,
        until: int | None = None,
    ) -> ScaleSession:
        """A session of the host model, or of another network of the same signature.

        Args:
            guidance, sampling: the call's if None.
            until: see `ScaleSession`.

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
            cache_dtype=self.cache_dtype,
            transform=self.transforms(chosen),
        )
        self.sessions.append(session)
        return session

    def decode(self) -> int:
        return decode(self.open_session(), self.canvas, self.schedule, self.randomness, self.on_step)
