"""What pipelines of all token models share: prompts, the course of a call, its statistics."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from varaccel.accelerators import Accelerator, resolve_accelerator
from varaccel.engine.canvas import Canvas
from varaccel.engine.job import Job
from varaccel.engine.loop import OnStep, Step
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.engine.statistics import Counts, SpeculationStats, StageStats, Statistics
from varaccel.engine.stopwatch import Stopwatch
from varaccel.errors import InputError, unknown_name
from varaccel.pipelines.loading import LoadablePipeline
from varaccel.pipelines.memory import memory_errors
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.pixels import OUTPUT_TYPES
from varaccel.tokenizers.text import TextFeatures, encode_prompts

logger = logging.getLogger(__name__)

StepCallback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]


class Interrupted(Exception):
    """Raised inside the decoding loop when the caller set `pipe._interrupt`."""


@dataclass(frozen=True)
class Call:
    """Checked arguments that calls of all pipelines have.

    Attributes:
        prompts: descriptions, or labels and names of classes.
        num_images_per_prompt: images of each.
        generators: one per image.
        accelerator: as it was asked for, before it is resolved.
        output_type: one of `OUTPUT_TYPES`.
        return_dict: False for a plain tuple.
        callback: called after every pass.
    """

    prompts: list[str | int]
    num_images_per_prompt: int
    generators: list[torch.Generator]
    accelerator: Accelerator
    output_type: str
    return_dict: bool
    callback: StepCallback | None

    @property
    def images(self) -> int:
        """Images of the call, B."""
        return len(self.generators)


@dataclass
class Run:
    """A call under way.

    Attributes:
        call: its arguments.
        settings: what else the family needs to know, such as guidance and sampling.
        condition: of each image: labels [B], or text features [B, T, C].
        mask: [B, T], true where a caption position is valid; None for labels.
        device: where it runs.
        canvas: what is decided so far; set by `_new_canvas`.
        sessions: all that were opened, the host model's first unless the accelerator has another idea.
        state: what a family keeps for the call beside the canvas, shared by its hooks.
    """

    call: Call
    settings: Any
    condition: Tensor
    mask: Tensor | None
    device: torch.device
    canvas: Canvas = field(init=False)
    sessions: list[Any] = field(default_factory=list)
    state: Any = None


class TokenPipeline(LoadablePipeline):
    """Base of all pipelines whose images are tokens on a canvas.

    A subclass registers its components, checks the arguments of its own in `__call__` and implements
    `_condition`, `_open_session`, `_make_job` and `_images`; the other hooks have defaults. Hooks run in this
    order: `_condition`, `_new_canvas`, `_randomness`, `_make_job`, then per session `_open_session`, per pass with
    a callback that asks for images `_preview`, and at the end `_images`, `_written` and `_cost`.

    Class attributes:
        family: the name by which accelerators know the model family, see `Accelerator.hosts`.
    """

    family: ClassVar[str]

    transformer: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(self) -> None:
        super().__init__()
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # -- what a family brings --------------------------------------------------------------------------

    @abstractmethod
    def _condition(self, prompts: list[str | int]) -> tuple[Tensor, Tensor | None]:
        """What the network is told about each prompt: labels [B] and None, or text features and their mask."""

    @abstractmethod
    def _open_session(self, run: Run, *args: Any, **options: Any) -> Any:
        """A session of the host model, or of another `network` (the first of `args`).

        Takes the options that accelerators of the family pass.
        """

    @abstractmethod
    def _make_job(self, run: Run, open_session: Callable[..., Any], randomness: Any, on_step: OnStep) -> Job:
        """The call as accelerators see it."""

    @abstractmethod
    def _images(self, run: Run) -> Any:
        """The finished canvas as `run.call.output_type` says; empty places of a stopped one hold code 0."""

    def _new_canvas(self, run: Run) -> Canvas:
        """Where the call starts: an empty canvas, or one with given tokens."""
        return Canvas.empty(run.call.images, self.transformer.num_tokens, device=run.device)

    def _randomness(self, run: Run) -> Any:
        """The source of draws for `run.canvas`."""
        return Randomness.draw(run.call.generators, run.canvas.num_positions, run.device)

    def _preview(self, run: Run, step: Step) -> Any:
        """What there is after a pass as images of the call's output type; arrays if that is "latent"."""
        return self._images(run)

    def _written(self, run: Run) -> Tensor:
        """The pass that decided each token, [B, h, w], or [B, N] if the tokens are not one grid."""
        return run.canvas.written

    def _cost(self, run: Run) -> tuple[int, int]:
        """Network rows per pass and bytes of the caches."""
        return run.sessions[0].rows_per_pass, sum(s.cache.nbytes for s in run.sessions)

    # -- the course of a call --------------------------------------------------------------------------

    def _checked_call(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        num_images_per_prompt: int,
        seed: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        accelerator: Accelerator | str | None,
        output_type: str,
        return_dict: bool,
        callback: StepCallback | None,
    ) -> Call:
        """The arguments that all families share.

        Raises:
            InputError: any of them cannot be used.
        """
        prompts = self._prompts(prompt)
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int):
            raise InputError(f"num_images_per_prompt must be an integer, got {num_images_per_prompt!r}.")
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
        if output_type not in OUTPUT_TYPES:
            raise unknown_name("output_type", str(output_type), OUTPUT_TYPES)
        return Call(
            prompts,
            num_images_per_prompt,
            image_generators(len(prompts) * num_images_per_prompt, seed, generator),
            resolve_accelerator(accelerator, self.family),
            output_type,
            return_dict,
            callback,
        )

    def _generate(self, call: Call, settings: Any) -> ImageOutput | tuple[Any, Statistics]:
        """Make the images of a call.

        Args:
            settings: handed to the hooks as `run.settings`.

        Raises:
            InputError: prompts that cannot be encoded, an accelerator that does not fit the model.
            OutOfMemory: the device is too small for the call.
        """
        with memory_errors(call.images):
            return self._run(call, settings)

    def _run(self, call: Call, settings: Any) -> ImageOutput | tuple[Any, Statistics]:
        device = self._execution_device
        clock = Stopwatch(device)
        condition, mask = self._condition(call.prompts)
        condition = condition.repeat_interleave(call.num_images_per_prompt, dim=0)
        mask = None if mask is None else mask.repeat_interleave(call.num_images_per_prompt, dim=0)
        clock.lap("text")

        run = Run(call, settings, condition, mask, device)
        first = Stopwatch(device)
        run.canvas = self._new_canvas(run)
        accelerator, passes, counts = self._decode(run, first)
        clock.lap("tokens")

        images = self._images(run)
        clock.lap("decode")
        self.maybe_free_model_hooks()
        rows, cache_bytes = self._cost(run)
        stats = Statistics(
            accelerator=accelerator.name,
            options=accelerator.options(),
            lossless=accelerator.lossless,
            images=call.images,
            tokens=run.canvas.num_positions,
            passes=passes,
            rows=rows,
            cache_bytes=cache_bytes,
            seconds=clock.laps,
            first_pass_seconds=first.laps.get("pass", 0.0),
            **_of_counts(counts),
            device=str(device),
            dtype=str(self.transformer.dtype).removeprefix("torch."),
        )
        if not call.return_dict:
            return images, stats
        return ImageOutput(images=images, stats=stats, written=self._written(run))

    def _decode(self, run: Run, first: Stopwatch) -> tuple[Accelerator, int, Counts | None]:
        """Fill `run.canvas`; what did it, in how many passes, and what it tells, None if it was stopped.

        `first` gets a lap called "pass" after the first one.
        """
        self._interrupt = False
        passes = 0
        counts: Counts | None = None

        def open_session(network: Any = None, **options: Any) -> Any:
            run.sessions.append(self._open_session(run, network, **options))
            return run.sessions[-1]

        with self.progress_bar(total=100) as bar:

            def on_step(step: Step) -> None:
                nonlocal passes
                passes = step.number
                if not first.laps:  # waits for the device, this once
                    first.lap("pass")
                bar.update(int(100 * step.progress) - bar.n)
                if run.call.callback is not None:
                    shown = {
                        "canvas": step.canvas,
                        "preview": lambda: self._preview(run, step),
                        "written": lambda: self._written(run),
                    }
                    run.call.callback(self, step.number - 1, step.decided, shown)
                if self._interrupt:
                    raise Interrupted

            job = self._make_job(run, open_session, self._randomness(run), on_step)
            accelerator = run.call.accelerator.resolve(job)
            with contextlib.suppress(Interrupted):
                counts = accelerator.run(job)
        return accelerator, counts.passes if isinstance(counts, StageStats) else passes, counts

    # -- conditions ------------------------------------------------------------------------------------

    def _prompts(self, prompt: str | int | Sequence[str | int]) -> list[str | int]:
        prompts = [prompt] if isinstance(prompt, (str, int)) else list(prompt)
        if not prompts:
            raise InputError("there is no prompt; give at least one.")
        return prompts

    def _labels(self, prompts: list[str | int]) -> Tensor:
        """Labels [B] of classes.

        Raises:
            InputError: no such class.
        """
        return torch.tensor([self.class_label(p) for p in prompts], device=self._execution_device)

    def _text(self, prompts: list[str | int], max_length: int) -> TextFeatures:
        """Features of descriptions in the transformer's number type; warns of words that are lost.

        Args:
            max_length: T, caption positions.

        Raises:
            InputError: a label instead of a description, or one that cannot be encoded.
        """
        wrong = next((p for p in prompts if not isinstance(p, str)), None)
        if wrong is not None:
            raise InputError(f"this model takes descriptions, not labels; got {wrong!r}.")
        descriptions = [str(p) for p in prompts]
        text = encode_prompts(
            self.tokenizer,
            self.text_encoder,
            descriptions,
            max_length=max_length,
            device=self._execution_device,
            dtype=self.transformer.dtype,
        )
        self._warn_of_unknown_words(descriptions)
        return text

    def _warn_of_unknown_words(self, prompts: list[str]) -> None:
        """Say which words of the prompts are lost, if the tokenizer's vocabulary is closed."""
        if not hasattr(self.tokenizer, "unknown_words"):
            return
        # a lone surrogate would stop the tokenizer; as in `encode_prompts`, it counts for nothing
        text = " ".join(prompts).encode("utf-8", "replace").decode()
        words = self.tokenizer.unknown_words(text)
        if words:
            more = f" and {len(words) - 10} more" if len(words) > 10 else ""
            logger.warning(
                "the model has never seen the words: %s%s; they are ignored.", ", ".join(words[:10]), more
            )

    def class_label(self, name: str | int) -> int:
        """The label of a class name, or a label itself if the model has it.

        Raises:
            InputError: no such class.
        """
        classes = self.transformer.config.num_classes
        if isinstance(name, int) and not isinstance(name, bool):
            if 0 <= name < classes:
                return name
            raise InputError(f"class labels of this model go from 0 to {classes - 1}, got {name}.")
        if isinstance(name, str) and name.strip().isdecimal():
            return self.class_label(int(name))
        labels: Mapping[str, int] = {}
        for label, entry in reversed(list(enumerate(self.config.class_names or []))):
            labels |= {part.strip().lower(): label for part in str(entry).split(",")}  # type: ignore[operator]
        wanted = str(name).strip().lower()
        if wanted not in labels:
            raise unknown_name("class", str(name), list(labels) or [f"0 to {classes - 1}"])
        return labels[wanted]


def _of_counts(counts: Counts | None) -> dict[str, Any]:
    """What an accelerator tells as fields of the statistics."""
    if isinstance(counts, StageStats):
        return {"stages": counts.stages}
    if not isinstance(counts, SpeculationStats):
        return {}
    accepted = counts.accepted / counts.attempts.clamp(min=1)
    return {
        "image_passes": tuple(counts.passes.tolist()),
        "accepted": tuple(accepted.tolist()),
        "draft_passes": counts.draft_passes,
        "kept": _kept(counts),
    }


def _kept(counts: SpeculationStats) -> tuple[float, ...]:
    """The share of each image's guesses that a rule kept."""
    if counts.verified is None:
        return ()
    return tuple((counts.accepted / counts.verified.clamp(min=1)).tolist())
