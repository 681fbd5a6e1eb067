"""What pipelines of models share that decide whole scales, coarse to fine."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varaccel.engine.canvas import Canvas
from varaccel.engine.job import Job
from varaccel.engine.loop import OnStep
from varaccel.errors import InputError
from varaccel.hosts.next_scale.feature_map import FeatureMap, Noise, ScaleQuantizer
from varaccel.hosts.next_scale.job import Draws, ScaleJob
from varaccel.hosts.next_scale.sampling import Sampling, ScaleGuidance
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.pipelines.base import Run, Work
from varaccel.pipelines.compiled_passes import SCALE_PASS
from varaccel.pipelines.inpainting import Source, kept_tokens
from varaccel.pipelines.painting import PaintingPipeline
from varaccel.pipelines.published import load_network


@dataclass(frozen=True)
class ScaleSettings:
    """What a call of these models needs to know beside what all calls do.

    Attributes:
        guidance, sampling: of the call.
        schedule: the scales of its images.
        smooth: soften code vectors, see `FeatureMap`.
        published_seed: seed of the published random stream; None for numbers of each image's own.
        cache_dtype: number type of stored keys and values.
        source: an image that is edited.
    """

    guidance: ScaleGuidance
    sampling: Sampling
    schedule: ScaleSchedule
    smooth: bool = False
    published_seed: int | None = None
    cache_dtype: torch.dtype | None = None
    source: Source | None = None


class NextScalePipeline(PaintingPipeline[ScaleSettings, ScaleJob], abstract=True):
    """Base of pipelines with a next-scale transformer and any accelerator for it.

    A subclass says how an image tokenizer adds up scales (`_quantizer`) and where numbers come from (`_draws`).
    """

    job_type: ClassVar[type[Job]] = ScaleJob
    compiled_pass = SCALE_PASS
    model_cpu_offload_seq = "text_encoder->transformer->vq_model"

    vq_model: Any
    refiner: Any

    @property
    @abstractmethod
    def schedule(self) -> ScaleSchedule:
        """The scales of the images unless a call says otherwise."""

    @property
    def drafters(self) -> dict[str, nn.Module]:
        return {} if self.refiner is None else {"refiner": self.refiner}

    @abstractmethod
    def _quantizer(self, schedule: ScaleSchedule) -> ScaleQuantizer:
        """What the scales of an image add up to."""

    @abstractmethod
    def _draws(self, run: Run[ScaleSettings, ScaleJob]) -> tuple[Draws, Noise | None]:
        """The source of draws for the canvas, and noise for softened code vectors, if they are wanted."""

    @abstractmethod
    def _encode_scales(self, images: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Token ids [1, L] of images [1, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def _pixel_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Height and width of images in pixels."""

    # -- what the base asks for ------------------------------------------------------------------------

    def _parts(self, work: Work) -> list[Any]:
        # between scales the code vectors of tokens are what the next scale reads
        return [*super()._parts(work), *([self.vq_model] if work == "tokens" else [])]

    def _new_canvas(self, run: Run[ScaleSettings, ScaleJob]) -> Canvas:
        source, schedule = run.settings.source, run.settings.schedule
        if source is None:
            return Canvas.empty(run.call.images, schedule.num_tokens, device=run.device)
        pixels, painted = source.fitted(self._pixel_size(schedule))
        kept = kept_tokens(painted, schedule)
        token_ids = self._encode_scales(pixels.to(run.device), schedule)
        return Canvas.given(token_ids.expand(run.call.images, -1), kept.expand(run.call.images, -1))

    def _job(self, run: Run[ScaleSettings, ScaleJob], on_step: OnStep) -> ScaleJob:
        settings = run.settings
        randomness, noise = self._draws(run)
        return ScaleJob(
            network=self.transformer,
            canvas=run.canvas,
            rows=run.canvas.batch * (2 if settings.guidance.enabled else 1),
            on_step=on_step,
            drafters=self.drafters,
            load_network=load_network,
            condition=run.condition,
            features=FeatureMap(self._quantizer(settings.schedule), run.canvas.batch, noise),
            guidance=settings.guidance,
            sampling=settings.sampling,
            randomness=randomness,
            schedule=Scales(settings.schedule),
            cache_dtype=settings.cache_dtype,
            transforms=self._transforms,
        )

    def _as_it_stands(self, run: Run[ScaleSettings, ScaleJob]) -> Run[ScaleSettings, ScaleJob]:
        still = super()._as_it_stands(run)
        features = run.job.features
        # what the next pass would do first; in the call's own thread, since softened vectors draw noise
        features.follow(run.canvas, self._finished_scales(run))
        still.job = dataclasses.replace(run.job, features=features.copy())
        return still

    def _latents(self, run: Run[ScaleSettings, ScaleJob]) -> Tensor:
        return run.canvas.tokens

    def _pixels(self, run: Run[ScaleSettings, ScaleJob]) -> Tensor:
        features = run.job.features
        features.follow(run.canvas, self._finished_scales(run))
        pixels: Tensor = self.vq_model.decode(features.value)
        return pixels

    @staticmethod
    def _finished_scales(run: Run[ScaleSettings, ScaleJob]) -> int:
        written = run.canvas.written
        ends = torch.tensor(run.settings.schedule.borders[1:], device=written.device) - 1
        return int((written[0, ends] > 0).sum())


def published_seed(wanted: bool, seed: int | None) -> int | None:
    """The seed of the published random stream, if that is wanted.

    Raises:
        InputError: there is none.
    """
    if not wanted:
        return None
    if seed is None:
        raise InputError("published_rng draws everything from one seed; pass seed as well.")
    return seed
