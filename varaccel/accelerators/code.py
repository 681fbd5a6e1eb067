"""Collaborative decoding (CoDe): a large model draws the coarse scales, a small one the fine scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from varaccel.accelerators.companion import companion
from varaccel.accelerators.plain import Plain
from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.engine.job import Job
from varaccel.engine.loop import decode
from varaccel.engine.options import positive_integer
from varaccel.engine.statistics import Stage, StageStats
from varaccel.engine.stopwatch import Stopwatch
from varaccel.errors import InputError
from varaccel.hosts.next_scale.sampling import ScaleGuidance
from varaccel.hosts.next_scale.schedule import ScaleInputs, Scales
from varaccel.hosts.next_scale.session import ScaleSession

if TYPE_CHECKING:  # models import decoding
    from varaccel.models.var import VARTransformer


class Relay:
    """Two sessions, one after the other, that look like one.

    The second is opened when the first has drawn its scales and freed its cache, so their caches never exist at the
    same time. It encodes by itself what it finds on the canvas.

    Args:
        openers: make the sessions.
        names: what the stages are called.
        border: the second session starts at this scale.
        device: to wait for at the border, so that times are true.
    """

    def __init__(
        self,
        openers: tuple[Callable[[], ScaleSession], Callable[[], ScaleSession]],
        names: tuple[str, str],
        border: int,
        device: torch.device,
    ) -> None:
        self.openers, self.names, self.border = openers, names, border
        self.stages: list[Stage] = []
        self._session: ScaleSession | None = None
        self._tokens = 0  # per image, of the stage that is running
        self._clock = Stopwatch(device)

    def predict(self, canvas: Canvas, inputs: ScaleInputs) -> Categorical:
        if inputs.scale == self.border:
            self.finish()
        if self._session is None:
            self._session = self.openers[len(self.stages)]()
        self._tokens += inputs.positions.shape[-1]
        return self._session.predict(canvas, inputs)

    def finish(self) -> None:
        """End the stage that is running: free its cache and note what it cost."""
        session = self._session
        if session is None:
            return
        session.close()
        name = self.names[len(self.stages)]
        self._clock.lap(name)
        seconds = self._clock.laps[name]
        self.stages.append(Stage(name, seconds, session.reads, self._tokens, session.cache_bytes))
        self._session, self._tokens = None, 0


@register
@dataclass(frozen=True)
class CoDe(Accelerator):
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
    hosts: ClassVar[tuple[str, ...]] = ("var",)
    summary: ClassVar[str] = "coarse scales by the model, fine ones by a smaller model"

    refiner: Any = None
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
            positive_integer("draft_scales", self.draft_scales)

    def resolve(self, job: Job) -> Accelerator:
        """With the number of scales that the large model draws; plain decoding if these are all."""
        count, scales = self._count(job), len(_order(job).schedule)
        return Plain() if count == scales else dataclasses.replace(self, draft_scales=count)

    def run(self, job: Job) -> StageStats:
        count = self._count(job)
        refiner = None if count == len(_order(job).schedule) else check_refiner(self.refiner, job)
        relay = Relay(
            (lambda: job.open_session(until=count), lambda: job.open_session(refiner, **self._changes())),
            ("draft", "refine"),
            count,
            job.device,
        )
        passes = decode(relay, job.canvas, job.schedule, job.randomness, job.on_step)
        relay.finish()
        return StageStats(passes, tuple(relay.stages))

    def _count(self, job: Job) -> int:
        scales = len(_order(job).schedule)
        count = self.draft_scales or max(1, min(scales - 1, round(0.8 * scales)))
        if count > scales:
            raise InputError(f"draft_scales must be from 1 to the model's {scales} scales, got {count}.")
        return count

    def _changes(self) -> dict[str, Any]:
        """Options of the refiner's session that differ from the call's."""
        options: dict[str, Any] = {}
        if self.refiner_guidance_scale is not None:
            options["guidance"] = ScaleGuidance(self.refiner_guidance_scale)
        names = ("temperature", "top_k", "top_p")
        given = {n: v for n in names if (v := getattr(self, f"refiner_{n}")) is not None}
        if given:
            options["sampling_changes"] = given
        return options


@register
@dataclass(frozen=True)
class Refiner(Accelerator):
    """The small model draws all scales: the other end of what CoDe trades.

    Attributes:
        refiner: as in `CoDe`.
    """

    name: ClassVar[str] = "refiner"
    hosts: ClassVar[tuple[str, ...]] = ("var",)
    summary: ClassVar[str] = "all scales by the smaller model, to compare CoDe with"

    refiner: Any = None

    @property
    def lossless(self) -> bool:
        return False

    def run(self, job: Job) -> int:
        session = job.open_session(check_refiner(self.refiner, job))
        return decode(session, job.canvas, job.schedule, job.randomness, job.on_step)


def _order(job: Job) -> Scales:
    assert isinstance(job.schedule, Scales)
    return job.schedule


def check_refiner(refiner: Any, job: Job) -> VARTransformer:
    """The refiner's network, if it can take over from the job's.

    Args:
        refiner: a network, a pipeline, its name, or None for what came with the model.

    Raises:
        InputError: there is none, or it has other scales, codes or conditions, or is on another device.
        CheckpointError: there is no model of that name.
    """
    from varaccel.models.var import VARTransformer

    chosen = companion(refiner, "refiner", job)
    if chosen is None:
        raise InputError(
            "this model came without a refiner; pass one, as in CoDe(refiner=small_pipe, draft_scales=8)."
        )
    if not isinstance(chosen, VARTransformer):
        raise InputError(
            f"a refiner is a VARTransformer or a pipeline that has one, got {type(chosen).__name__}."
        )
    own: Any = job.network
    if chosen.schedule != own.schedule:
        raise InputError(
            f"the refiner's scales {list(chosen.schedule.sides)} are not the model's "
            f"{list(own.schedule.sides)}; both must be made for one resolution."
        )
    for name, what in (("vocab_size", "codes"), ("codebook_dim", "numbers per code")):
        if chosen.config[name] != own.config[name]:
            raise InputError(
                f"the refiner has {chosen.config[name]} {what} and the model {own.config[name]}; "
                "both must use the same image tokenizer."
            )
    condition = "num_classes" if own.config.condition_type == "class" else "caption_dim"
    for name in ("condition_type", condition):
        if chosen.config[name] != own.config[name]:
            raise InputError(
                f"the refiner's {name} is {chosen.config[name]!r} and the model's {own.config[name]!r}; "
                "both must be conditioned on the same things."
            )
    if chosen.device != job.device:
        raise InputError(
            f"the refiner is on {chosen.device}, the model on {job.device}; move it there with .to()."
        )
    return chosen
