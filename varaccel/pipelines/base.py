"""What pipelines of all token models share: prompts, the course of a call, its statistics."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from varaccel.accelerators import AnyAccelerator, resolve_accelerator
from varaccel.engine.accelerator import plan_call
from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import Counts, SpeculationStats, StageStats, added_counts
from varaccel.engine.job import Job
from varaccel.engine.loop import OnStep, Step
from varaccel.engine.network import Network
from varaccel.engine.options import as_integer, positive_integer
from varaccel.engine.randomness import image_generators
from varaccel.engine.statistics import Statistics
from varaccel.engine.stopwatch import Stopwatch
from varaccel.errors import InputError, unknown_name
from varaccel.nn.condition import Condition
from varaccel.nn.eval_mode import eval_mode
from varaccel.nn.number_check import check_finite
from varaccel.nn.packed_weights import packed_weights, round_to_float16
from varaccel.nn.scale_schedule import NO_TOKEN
from varaccel.nn.signature import Paradigm, Signature
from varaccel.pipelines.class_names import find_class
from varaccel.pipelines.compiled import Compilation, CompiledPass
from varaccel.pipelines.loading import LoadablePipeline
from varaccel.pipelines.memory import check_images, memory_errors
from varaccel.pipelines.offloading import bring
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.pixels import OUTPUT_TYPES, to_output
from varaccel.pipelines.running_calls import RunningCall, calls_meant, running, turn_on_device
from varaccel.pipelines.step_callback import StepCallback, check_callback, check_returned
from varaccel.tokenizers.text import TextFeatures, encode_prompts, prompt_text

logger = logging.getLogger(__name__)


NO_PROMPT = "\0no prompt"
"""What stands for "no prompt" among prompts; recognised by identity, so that nobody can write it."""


@dataclass
class _Cost:
    """What the passes of a call took: their number, and the most rows and bytes of a cache at a time.

    Attributes:
        before: passes of the parts of the call that are done.
    """

    passes: int = 0
    rows: int = 0
    cache_bytes: int = 0
    before: int = 0

    def add(self, job: Job) -> None:
        """Count the sessions of a job."""
        if job.sessions:
            self.rows = max(self.rows, job.sessions[0].rows_per_pass)
            self.cache_bytes = max(self.cache_bytes, job.cache_bytes)


class Interrupted(Exception):
    """Raised inside the decoding loop when the call is stopped."""


@dataclass(frozen=True)
class Call:
    """Checked arguments that calls of all pipelines have.

    Attributes:
        prompts: descriptions, or labels and names of classes; `NO_PROMPT` alone for none.
        num_images_per_prompt: images of each.
        generators: one per image.
        accelerator: as it was asked for, before it is resolved.
        output_type: one of `OUTPUT_TYPES`.
        return_dict: False for a plain tuple.
        callback: called after every pass.
        batch_size: images that are decoded at once, at most; all if None.
    """

    prompts: list[str | int]
    num_images_per_prompt: int
    generators: list[torch.Generator]
    accelerator: AnyAccelerator
    output_type: str
    return_dict: bool
    callback: StepCallback | None
    batch_size: int | None = None

    @property
    def images(self) -> int:
        """Images of the call, B."""
        return len(self.generators)

    @property
    def at_once(self) -> int:
        """Images that are decoded at once."""
        return self.images if self.batch_size is None else min(self.batch_size, self.images)

    def part(self, images: slice) -> Call:
        """The call for some of the images."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.num_images_per_prompt)]
        return replace(
            self, prompts=prompts[images], num_images_per_prompt=1, generators=self.generators[images]
        )


SettingsT = TypeVar("SettingsT")
JobT = TypeVar("JobT", bound=Job)

Work = Literal["text", "tokens", "pixels"]
"""What a call has to do: prompts to conditions, the tokens of the canvas, pixels of tokens and back."""


@dataclass
class Run(Generic[SettingsT, JobT]):
    """A call under way.

    Attributes:
        call: its arguments.
        settings: what else the family needs to know, such as guidance and sampling.
        condition: of each image; None for no condition.
        device: where it runs.
        canvas: what is decided so far; set by `_new_canvas`.
        job: the call as accelerators see it; set by `_job`.
        parts: of a call in several batches the runs of each, on views of the canvas; none of a call in one.
    """

    call: Call
    settings: SettingsT
    condition: Condition | None
    device: torch.device
    canvas: Canvas = field(init=False)
    job: JobT = field(init=False)
    parts: list[Run[SettingsT, JobT]] = field(default_factory=list)

    def split(self) -> None:
        """Make `parts` of as many images as are decoded at once, if there are more."""
        size, total = self.call.at_once, self.call.images
        if size == total:
            return
        for first in range(0, total, size):
            images = slice(first, first + size)
            condition = None if self.condition is None else self.condition.part(images)
            part: Run[SettingsT, JobT] = Run(self.call.part(images), self.settings, condition, self.device)
            part.canvas = self.canvas.part(images)
            self.parts.append(part)


class TokenPipeline(LoadablePipeline, Generic[SettingsT, JobT], abstract=True):
    """Base of all pipelines whose images are tokens on a canvas.

    A subclass registers its components, checks the arguments of its own in `__call__` and implements `_job`,
    `_latents` and `_pixels`; the other hooks have defaults. Hooks run in this order: `_condition`, `_new_canvas`,
    `_job`, and at the end, and per pass with a callback that asks for it, `_latents` or `_pixels`, and `_written`.

    Class attributes:
        family: what people call the kind of model.
        job_type: the kind of job that the pipeline makes; accelerators say which kinds they can do.
        compiled_pass: what `compile` compiles of its networks.
        cleans_prompts: whether texts go through the caption cleaner before T5, see `encode_prompts`.
    """

    family: ClassVar[str] = "unnamed"
    job_type: ClassVar[type[Job]]
    compiled_pass: ClassVar[CompiledPass | None] = None
    cleans_prompts: ClassVar[bool] = True

    transformer: Any
    text_encoder: Any
    tokenizer: Any
    _compilation: Compilation | None = None
    _kept: Compilation | None = None  # what was compiled before `uncompile`

    @property
    def interrupt(self) -> bool:
        """Whether a call is told to stop: in a callback its own, elsewhere any call of this pipeline."""
        return any(call.stopped for call in calls_meant(self))

    @property
    def _interrupt(self) -> bool:
        """Set to True in a callback, it ends the call that the callback belongs to; set in a thread that makes no call
        of this pipeline, all calls of it that are under way. See `shown["stop"]` of a callback for one call of many.
        """
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, stopped: bool) -> None:
        for call in calls_meant(self):
            call.stopped = bool(stopped)

    @property
    def image_tokenizer(self) -> Any:
        """The component that turns tokens into pixels."""
        parts = self.components
        return parts["vae"] if parts.get("vq_model") is None else parts["vq_model"]

    @property
    def drafters(self) -> dict[str, nn.Module]:
        """The further networks that came with the model, by the names that accelerators know them by."""
        return {}

    # -- compilation -----------------------------------------------------------------------------------

    def compile(
        self, mode: str | None = None, *, backend: str | Callable[..., Any] = "inductor", **options: Any
    ) -> None:
        """Compile the networks: the first calls after it take minutes, later ones less than before.

        Compiled are the passes of the model and of whatever drafts or refines for it, and the step of a diffusion
        head. Numbers of rows, draft tokens and cache slots that come up later need no new version. What torch.compile
        makes is kept on disk, so another process starts faster. Where there is no compiler, a warning says so and the
        pipeline stays as it is.

        Args:
            mode: of `torch.compile`. If None, "reduce-overhead" on a GPU, which records CUDA graphs (for LlamaGen, VAR
                and models of transformers; MAR records the loop of its head in any case), and "default" elsewhere.
            backend, options: further arguments of `torch.compile`.

        Raises:
            InputError: a mode that there is not, or one together with options of the compiler; a family that does not
                say in `compiled_pass` what to compile.
        """
        if self.compiled_pass is None:
            raise InputError(f"{type(self).__name__} names nothing to compile; set its compiled_pass.")
        compilation = Compilation(mode, backend, **options)
        if self._kept is not None and self._kept.settings == compilation.settings:
            compilation = self._kept
        self._kept = compilation
        self._compilation = compilation if compilation.usable(self.transformer.device) else None

    def uncompile(self) -> None:
        """Run the networks as they were before `compile`. What was compiled is kept for the same `compile` again."""
        self._compilation = None

    @property
    def is_compiled(self) -> bool:
        """Whether calls run compiled networks."""
        return self._compilation is not None

    def _transforms(self, network: Any) -> Callable[..., Tensor] | None:
        """The compiled pass of a network of a call, None for the eager one."""
        if self._compilation is None or self.compiled_pass is None:
            return None
        return self._compilation.of(network, self.compiled_pass)

    # -- what a family brings --------------------------------------------------------------------------

    @abstractmethod
    def _job(self, run: Run[SettingsT, JobT], on_step: OnStep) -> JobT:
        """The call as accelerators see it."""

    @abstractmethod
    def _latents(self, run: Run[SettingsT, JobT]) -> Any:
        """The canvas for `output_type="latent"`; empty places of a stopped call hold token 0."""

    @abstractmethod
    def _pixels(self, run: Run[SettingsT, JobT]) -> Tensor:
        """What the canvas shows so far, decoded: [B, 3, H, W] in about [-1, 1]."""

    def _condition(self, prompts: list[str | int]) -> Condition | None:
        """What the networks are told about each prompt: labels, or text features and their mask."""
        kind = self.transformer.signature().condition
        if kind == "class":
            return Condition(self._labels(prompts))
        if self.text_encoder is None:
            raise InputError(
                f"{type(self).__name__} cannot make a condition of kind {kind!r} from prompts; implement `_condition`."
            )
        text = self._text(prompts, self._caption_length())
        return Condition(text.features, text.mask)

    def _call_condition(self, call: Call, settings: SettingsT) -> Condition | None:
        """The condition of each prompt of a call."""
        return (
            self._without_prompt(settings) if call.prompts[0] is NO_PROMPT else self._condition(call.prompts)
        )

    def _without_prompt(self, settings: SettingsT) -> Condition | None:
        """What the networks are told of one image without a prompt; None for networks that need no condition."""
        return None

    def _caption_length(self) -> int:
        """Caption positions T."""
        return int(self.text_encoder.config.max_length)

    def _new_canvas(self, run: Run[SettingsT, JobT]) -> Canvas:
        """Where the call starts: an empty canvas, or one with given tokens."""
        return Canvas.empty(run.call.images, self.transformer.num_tokens, device=run.device)

    def _written(self, run: Run[SettingsT, JobT]) -> Tensor:
        """The pass that decided each token, [B, h, w], or [B, N] if the tokens are not one grid."""
        return run.canvas.written

    def quantize(self, kind: str = "float16") -> Self:
        """Make calls on a processor read smaller weights, for good: for models whose files hold float32.

        Their linear layers read every number at four bytes, and a decoding pass takes as long as that. Rounded to
        float16 they are read at two, see `varaccel.nn.packed_weights`; all arithmetic stays in float32. Shipped models
        are stored as float16: for them nothing changes.

        Args:
            kind: "float16", of the networks that decide tokens.

        Raises:
            InputError: another kind, or networks that are not in float32 on a processor.
        """
        if kind != "float16":
            raise unknown_name("quantize", str(kind), ["float16"])
        networks = [part for part in self._parts("tokens") if isinstance(part, nn.Module)]
        if not sum(round_to_float16(network) for network in networks):
            raise InputError(
                "quantize is for float32 weights on a CPU; for another device load the model with dtype=torch.float16."
            )
        return self

    def check_images(self, count: int) -> None:
        """Refuse, before anything is made, more images in one call than the memory of the device holds.

        Raises:
            OutOfMemory: see above.
        """
        try:
            pixels = int(self.image_size) ** 2
        except (AttributeError, InputError):  # images of no single size: a pixel per token at least
            pixels = math.prod(self.transformer.signature().layout or ())
        check_images(count, pixels, self._execution_device)

    # -- the course of a call --------------------------------------------------------------------------

    def _checked_call(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        num_images_per_prompt: int,
        seed: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        accelerator: AnyAccelerator | str | None,
        output_type: str,
        return_dict: bool,
        callback: StepCallback | None,
        batch_size: int | None = None,
    ) -> Call:
        """The arguments that all families share.

        Raises:
            InputError: any of them cannot be used.
            OutOfMemory: more images than the device can hold.
        """
        prompts = self._prompts(prompt)
        num_images_per_prompt = positive_integer("num_images_per_prompt", num_images_per_prompt)
        if batch_size is not None:
            batch_size = positive_integer("batch_size", batch_size)
        if output_type not in OUTPUT_TYPES:
            raise unknown_name("output_type", str(output_type), OUTPUT_TYPES)
        check_callback(callback)
        images = len(prompts) * num_images_per_prompt
        self.check_images(images)
        with memory_errors(images):
            generators = image_generators(images, seed, generator)
        return Call(
            prompts,
            num_images_per_prompt,
            generators,
            resolve_accelerator(accelerator, self.job_type, f"{self.family} models"),
            output_type,
            return_dict,
            callback,
            batch_size,
        )

    def _generate(self, call: Call, settings: SettingsT) -> ImageOutput | tuple[Any, Statistics]:
        """Make the images of a call.

        Args:
            settings: handed to the hooks as `run.settings`.

        Raises:
            InputError: prompts that cannot be encoded, an accelerator that does not fit the model.
            OutOfMemory: the device is too small for the call.
        """
        networks = [*self._networks(), *call.accelerator.networks()]
        with (
            memory_errors(call.at_once),
            torch.no_grad(),
            eval_mode(networks),
            running(self) as control,
            turn_on_device(networks),
            packed_weights(networks),
        ):
            return self._run(call, settings, control)

    def _networks(self) -> list[nn.Module]:
        """The components that are networks."""
        return [part for part in vars(self).values() if isinstance(part, nn.Module)]

    def _parts(self, work: Work) -> list[Any]:
        """The components that work of this kind runs, None for missing ones.

        A pipeline with `enable_model_cpu_offload` has them on the device together, and no others.
        """
        if work == "text":
            return [self.text_encoder]
        return [self.transformer, *self.drafters.values()] if work == "tokens" else [self.image_tokenizer]

    def _bring(self, work: Work, *further: nn.Module) -> None:
        """Have what runs next on the device, see `bring`."""
        bring([*self._parts(work), *further], self._networks())

    def _run(
        self, call: Call, settings: SettingsT, control: RunningCall
    ) -> ImageOutput | tuple[Any, Statistics]:
        device = self._execution_device
        clock = Stopwatch(device)
        # without a prompt the network itself says what is read instead
        self._bring("tokens" if call.prompts[0] is NO_PROMPT else "text")
        condition = self._call_condition(call, settings)
        if condition is not None:
            condition = condition.repeat_interleave(call.num_images_per_prompt)
        run: Run[SettingsT, JobT] = Run(call, settings, condition, device)
        run.canvas = self._new_canvas(run)
        run.split()
        clock.lap("text")

        first = Stopwatch(device)
        accelerator, cost, counts = self._decode(run, first, control)
        clock.lap("tokens")

        latent = call.output_type == "latent"
        images = self._latents(run) if latent else self._shown(run)
        clock.lap("decode")
        self.maybe_free_model_hooks()
        decided = int((run.canvas.written > 0).sum(1).min())
        stats = Statistics(
            accelerator=accelerator.name,
            options=accelerator.options(),
            lossless=accelerator.lossless,
            images=call.images,
            tokens=int(_drawn(run.canvas).min()),
            interrupted=decided < run.canvas.num_positions,
            batch_size=call.at_once,
            passes=cost.passes,
            rows=cost.rows,
            cache_bytes=cost.cache_bytes,
            seconds=clock.laps,
            first_pass_seconds=first.laps.get("pass", 0.0),
            **_of_counts(counts),
            device=str(device),
            dtype=str(self.transformer.dtype).removeprefix("torch."),
        )
        if not call.return_dict:
            return _owned(images), stats
        return ImageOutput(images=_owned(images), stats=stats, written=_owned(self._written(run)))

    def _decode(
        self, run: Run[SettingsT, JobT], first: Stopwatch, control: RunningCall
    ) -> tuple[AnyAccelerator, _Cost, Counts | None]:
        """Fill `run.canvas`; what did it, at which cost, and what it tells, None if it was stopped.

        `first` gets a lap called "pass" after the first one.
        """
        cost = _Cost()
        mode = torch.is_inference_mode_enabled()
        drafters = run.call.accelerator.networks()
        self._bring("tokens", *drafters)

        with self.progress_bar(total=100) as bar:

            def on_step(step: Step) -> None:
                cost.passes = step.number
                if not first.laps:  # waits for the device, this once
                    first.lap("pass")
                bar.update(int(100 * step.progress) - bar.n)
                if run.call.callback is not None:
                    # the caller's code: its tensors are to be as elsewhere
                    with torch.inference_mode(mode), torch.no_grad(), control.waiting():
                        shown = self._shown_to_callback(self._all_as_it_stands(run), control)
                        returned = run.call.callback(self, step.number - 1, step.decided, dict(shown))
                        check_returned(shown, returned)
                        self._bring("tokens", *drafters)  # where a preview or a call within had its turn
                if control.stopped:
                    raise Interrupted

            # Several per cent faster than no_grad where passes are small. The canvas was made outside, so that what
            # becomes of it can be changed and learned from.
            told: list[Counts] = []
            counts: Counts | None = None
            with torch.inference_mode():
                run.job = self._job(run, on_step)
                if run.parts:
                    at_once = run.call.at_once
                    rows = run.job.rows * at_once // run.call.images
                    run.job = replace(run.job, batch_size=at_once, rows=rows)
                plan = plan_call(run.call.accelerator, run.job)
                parts = [
                    (job, plan_call(plan.accelerator, job)) for job in self._part_jobs(run, cost, on_step)
                ]
                if plan.accelerator.continuous or not run.parts:
                    parts = [(run.job, plan)]
                with contextlib.suppress(Interrupted):
                    for job, planned in parts:
                        try:
                            told.append(planned.run())
                        finally:
                            cost.add(job)
                        if run.parts:
                            job.report_numbers()
                            job.release()
                    counts = added_counts(told)
                job.report_numbers()
            if isinstance(counts, StageStats):
                cost.passes = counts.passes
        return plan.accelerator, cost, counts

    @staticmethod
    def _part_jobs(run: Run[SettingsT, JobT], cost: _Cost, on_step: OnStep) -> list[JobT]:
        """The jobs of the parts of a call, which are done one after the other and tell of the whole."""
        images, first = run.call.images, 0
        jobs = []
        for part in run.parts:

            def observe(step: Step, first: int = first, count: int = part.call.images) -> None:
                if step.number == 1:
                    cost.before = cost.passes
                shown = step.positions.expand(count, -1)
                positions = shown.new_full((images, shown.shape[1]), -1)
                positions[first : first + count] = shown
                progress = (first + step.progress * count) / images
                on_step(Step(cost.before + step.number, progress, positions, run.canvas))

            of_part = run.job.part(range(first, first + part.call.images))
            part.job = replace(of_part, canvas=part.canvas, on_step=observe)
            jobs.append(part.job)
            first += part.call.images
        return jobs

    def _all_as_it_stands(self, run: Run[SettingsT, JobT]) -> Run[SettingsT, JobT]:
        if not run.parts:
            return self._as_it_stands(run)
        still = copy.copy(run)
        still.parts = [self._as_it_stands(part) for part in run.parts]
        still.canvas = run.canvas.part(torch.arange(run.canvas.batch, device=run.device))
        return still

    def _as_it_stands(self, run: Run[SettingsT, JobT]) -> Run[SettingsT, JobT]:
        """The run with a canvas that stays as it is now, for whoever looks at it later or from another thread."""
        canvas, still = run.canvas, copy.copy(run)
        still.canvas = Canvas(canvas.tokens.clone(), canvas.written.clone(), canvas.fixed)
        return still

    def _shown_to_callback(self, run: Run[SettingsT, JobT], control: RunningCall) -> dict[str, Any]:
        @torch.no_grad()
        def preview() -> Any:
            networks = self._networks()
            if control.waits:
                with eval_mode(networks):
                    return _owned(self._shown(run))
            with turn_on_device(networks), eval_mode(networks):
                try:
                    return _owned(self._shown(run))
                finally:
                    bring((), networks)

        return {
            "canvas": run.canvas,
            "preview": preview,
            "written": lambda: self._written(run),
            "stop": control.stop,
        }

    def _shown(self, run: Run[SettingsT, JobT]) -> Any:
        """The canvas so far as images of the call's output type; arrays if that is "latent"."""
        self._bring("pixels")
        pixels = torch.cat([self._pixels(part) for part in run.parts or [run]])
        check_finite(pixels, self.image_tokenizer, pixels.dtype, "pixels")
        return to_output(pixels, run.call.output_type)

    @staticmethod
    def _check_network(network: object, paradigm: Paradigm) -> Signature:
        """The signature of a network that a pipeline is given.

        Raises:
            InputError: no network with a signature, or one that decides images in another way.
        """
        if not isinstance(network, Network):
            raise InputError(
                f"a {type(network).__name__} is no transformer for this pipeline; pass a network with device, dtype "
                "and signature()."
            )
        signature = network.signature()
        if signature.paradigm != paradigm:
            raise InputError(
                f"a {type(network).__name__} is a {signature.paradigm} network, this pipeline needs a {paradigm} one."
            )
        return signature

    @staticmethod
    def _check_text(signature: Signature, text_encoder: Any, tokenizer: Any) -> None:
        """Refuse a text-conditional network without what reads texts.

        Raises:
            InputError: text encoder or tokenizer is missing.
        """
        if signature.condition == "caption" and (text_encoder is None or tokenizer is None):
            raise InputError("a text-conditional transformer needs a text_encoder and a tokenizer.")

    # -- conditions ------------------------------------------------------------------------------------

    def check_prompts(self, prompts: Iterable[str | int]) -> None:
        """Refuse prompts that a call would refuse, without drawing: to be asked before a long run.

        A class with a `_condition` of its own reads prompts as it likes; for it this does nothing unless overridden.

        Raises:
            InputError: no such class, a label instead of a description, or nothing to be drawn in it.
        """
        if not type(self)._condition.__module__.startswith("varaccel."):
            return
        by_class = self.transformer.signature().condition == "class"
        for prompt in dict.fromkeys(prompts):
            if by_class:
                self.class_label(prompt)
            elif not isinstance(prompt, str):
                raise _no_description(prompt)
            elif self.tokenizer is not None:
                prompt_text(self.tokenizer, prompt, self.cleans_prompts)

    def _prompts(self, prompt: str | int | Sequence[str | int]) -> list[str | int]:
        if isinstance(prompt, Mapping):
            raise InputError("the prompt is a dictionary; give its entries as arguments, pipe(**inputs).")
        label = as_integer(prompt)
        if label is not None or isinstance(prompt, (str, bytes)) or not isinstance(prompt, Iterable):
            return [self._prompt(prompt if label is None else label)]
        prompts = [self._prompt(entry) for entry in prompt]
        if not prompts:
            raise InputError("there is no prompt; give at least one.")
        return prompts

    @staticmethod
    def _prompt(value: object) -> str | int:
        if isinstance(value, str):
            return value  # as it is: a subclass may mean something
        label = as_integer(value)
        if label is None:
            raise InputError(f"a prompt must be a description, or a class by name or label; got {value!r}.")
        return label

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
        descriptions = self._descriptions(prompts)
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

    @staticmethod
    def _descriptions(prompts: list[str | int]) -> list[str]:
        """The prompts of a model that reads texts.

        Raises:
            InputError: a label among them.
        """
        wrong = next((p for p in prompts if not isinstance(p, str)), None)
        if wrong is not None:
            raise _no_description(wrong)
        return [str(p) for p in prompts]

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
        """The label of a class name, or a label itself if the model has it; see `find_class`.

        Raises:
            InputError: no such class, or several.
        """
        classes = self.transformer.signature().condition_size
        label = as_integer(name)
        if label is None and isinstance(name, str) and name.strip().isdecimal():
            label = int(name)
        if label is None:
            return find_class(str(name), self.config.class_names or [], classes)
        if 0 <= label < classes:
            return label
        raise InputError(f"class labels of this model go from 0 to {classes - 1}, got {label}.")


def _drawn(canvas: Canvas) -> Tensor:
    """Tokens of each image [B], without places where a scale was left out."""
    decided = canvas.written > 0
    if not canvas.tokens.is_floating_point():
        decided = decided & (canvas.tokens != NO_TOKEN)
    return decided.sum(1)


def _owned(images: Any) -> Any:
    """What leaves a call: a tensor that can be changed in place and learned from."""
    return images.clone() if isinstance(images, Tensor) and images.is_inference() else images


def _no_description(prompt: object) -> InputError:
    return InputError(f"this model takes descriptions, not labels; got {prompt!r}.")


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
    """The share of each image's draft tokens that a rule kept."""
    if counts.verified is None:
        return ()
    return tuple((counts.accepted / counts.verified.clamp(min=1)).tolist())
