"""A call of a masked model with a diffusion head: groups of any positions, continuous tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from varaccel.engine.job import Job
from varaccel.engine.loop import decode
from varaccel.hosts.masked.denoising import HeadSampling, Loop, Step, denoising_step
from varaccel.hosts.masked.guidance import MaskedGuidance
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.masked.schedule import CosineGroups
from varaccel.hosts.masked.session import FeatureCacheSession, MaskedSession
from varaccel.models.mar import MARTransformer
from varaccel.nn.condition import Condition


@dataclass(frozen=True, kw_only=True)
class MaskedJob(Job):
    """What accelerators of masked models are given.

    Attributes:
        network: the host model.
        condition: of the B images.
        guidance, sampling: of the call.
        randomness: orders and noise of the images.
        schedule: the groups of positions that are decided together.
        step, loop: of the diffusion head, see `MaskedSession`.
    """

    network: MARTransformer
    condition: Condition
    guidance: MaskedGuidance
    sampling: HeadSampling
    randomness: TokenNoise
    schedule: CosineGroups
    step: Step = denoising_step
    loop: Loop | None = None

    def _of_images(self, images: Sequence[int]) -> dict[str, Any]:
        noise = self.randomness.part(images)
        return {
            "condition": self.condition.part(images),
            "randomness": noise,
            "schedule": replace(self.schedule, permutation=noise.permutation),
        }

    def release(self) -> None:
        super().release()
        self.randomness.forget()

    def open_session(
        self,
        network: MARTransformer | None = None,
        *,
        sampling: HeadSampling | None = None,
        contexts: int = 1,
    ) -> MaskedSession:
        """A session of the host model, or of another network of the same signature.

        Args:
            sampling: the call's if None.
            contexts: canvases per image that are read side by side.
        """
        chosen = self.network if network is None else network
        session = MaskedSession(
            chosen,
            self.condition.repeat_interleave(contexts),
            batch=self.canvas.batch * contexts,
            guidance=self.guidance,
            sampling=sampling or self.sampling,
            transform=self.transforms(chosen),
            step=self.step,
            loop=self.loop,
        )
        self.sessions.append(session)
        return session

    def open_feature_cache_session(
        self, *, refresh: int, keep_unconditional: bool, sampling: HeadSampling | None = None
    ) -> FeatureCacheSession:
        """A session of the host model that reads most of what it knows only every few passes.

        Args:
            refresh, keep_unconditional: see `FeatureCacheSession`.
            sampling: the call's if None.
        """
        session = FeatureCacheSession(
            self.network,
            self.condition,
            batch=self.canvas.batch,
            refresh=refresh,
            keep_unconditional=keep_unconditional,
            guidance=self.guidance,
            sampling=sampling or self.sampling,
            step=self.step,
            loop=self.loop,
        )
        self.sessions.append(session)
        return session

    def decode(self) -> int:
        return decode(self.open_session(), self.canvas, self.schedule, self.randomness, self.on_step)
