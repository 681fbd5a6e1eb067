"""Pictures from prompts or classes with LlamaGen (arXiv 2406.06525)."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from varaccel.decoding.accelerator import Accelerator, Job, resolve_accelerator
from varaccel.decoding.canvas import Canvas
from varaccel.decoding.guidance import Guidance
from varaccel.decoding.loop import Step
from varaccel.decoding.neighbours import neighbour_table
from varaccel.decoding.network_drafter import check_same_codes
from varaccel.decoding.randomness import Randomness, picture_generators
from varaccel.decoding.sampling import Sampling
from varaccel.decoding.session import CausalSession
from varaccel.decoding.statistics import Statistics, Tally
from varaccel.errors import InputError, unknown_name
from varaccel.models.eagle import EagleHead
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.pipelines.loading import LoadablePipeline
from varaccel.pipelines.memory import memory_errors
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.pixels import OUTPUT_TYPES, to_output
from varaccel.tokenizers.text import encode_prompts
from varaccel.tokenizers.vq import VQModel

logger = logging.getLogger(__name__)

StepCallback = Callable[["LlamaGenPipeline", int, int, dict[str, Any]], dict[str, Any] | None]


class Interrupted(Exception):
    """Raised inside the decoding loop when the caller set `pipe._interrupt`."""


class LlamaGenPipeline(LoadablePipeline):
    """Text- or class-conditional generation with a LlamaGen transformer and any accelerator for it.

    Args:
        transformer: the autoregressive model.
        vq_model: the image tokenizer whose codes it predicts.
        text_encoder, tokenizer: for text-conditional models: Flan-T5 as published, or the word-level encoder
            of the small shipped model; see `varaccel.tokenizers.text`.
        class_names: for class-conditional models, names that can be used instead of labels.
        guidance_scale, top_k, temperature: defaults of a call.
        eagle_head, draft_transformer: drafters for speculative accelerators, trained for this transformer; see
            `varaccel train drafter`.

    Raises:
        InputError: components that do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vq_model"
    _optional_components = ["text_encoder", "tokenizer", "eagle_head", "draft_transformer"]  # noqa: RUF012

    transformer: LlamaGenTransformer
    vq_model: VQModel
    text_encoder: Any
    tokenizer: Any
    eagle_head: EagleHead | None
    draft_transformer: LlamaGenTransformer | None

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        vq_model: VQModel,
        text_encoder: Any = None,
        tokenizer: Any = None,
        class_names: Sequence[str] | None = None,
        guidance_scale: float = 4.0,
        top_k: int = 0,
        temperature: float = 1.0,
        eagle_head: EagleHead | None = None,
        draft_transformer: LlamaGenTransformer | None = None,
    ) -> None:
        super().__init__()
        if transformer.config.vocab_size != vq_model.codebook_size:
            raise InputError(
                f"the transformer predicts {transformer.config.vocab_size} codes but the image tokenizer has "
                f"{vq_model.codebook_size}; use the tokenizer that the transformer was trained with."
            )
        if transformer.config.model_type == "t2i" and (text_encoder is None or tokenizer is None):
            raise InputError("a text-conditional transformer needs a text_encoder and a tokenizer.")
        if eagle_head is not None:
            eagle_head.check_fits(transformer)
        if draft_transformer is not None:
            check_same_codes(draft_transformer, transformer)
        self.register_modules(
            transformer=transformer,
            vq_model=vq_model,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            eagle_head=eagle_head,
            draft_transformer=draft_transformer,
        )
        self.register_to_config(
            class_names=None if class_names is None else list(class_names),
            guidance_scale=guidance_scale,
            top_k=top_k,
            temperature=temperature,
        )
        self._interrupt = False
        self._tables: dict[bool, Tensor] = {}
        self._compiled: Callable[..., Tensor] | None = None

    @property
    def image_size(self) -> int:
        """Height and width of the pictures in pixels."""
        return self.transformer.config.grid_size * self.vq_model.downsample_factor

    @property
    def drafters(self) -> dict[str, nn.Module]:
        """The drafters that came with the model, by the names that accelerators know them by."""
        found = {"eagle": self.eagle_head, "small": self.draft_transformer}
        return {name: drafter for name, drafter in found.items() if drafter is not None}

    def _neighbours(self, k: int, normalise: bool) -> Tensor:
        """Nearest neighbours in the codebook, int32 [V, k + 1]; kept for the next call."""
        table = self._tables.get(normalise)
        if table is None or table.shape[1] < min(k + 1, self.vq_model.codebook_size - 1):
            weight = self.vq_model.quantize.embedding.weight.detach().float()
            table = neighbour_table(weight, k, normalise=normalise)
            self._tables[normalise] = table
        return table

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        vq_model: VQModel | str | os.PathLike[str],
        text_encoder: Any = None,
        tokenizer: Any = None,
        grid_size: int | None = None,
        num_heads: int | None = None,
        **settings: Any,
    ) -> Self:
        """Build a pipeline from published files.

        Args:
            path: the transformer's checkpoint, such as `c2i_XL_384.pt`.
            vq_model: the image tokenizer, or its file, such as `vq_ds16_c2i.pt`.
            text_encoder, tokenizer: for text-conditional models, e.g. Flan-T5-XL from transformers.
            grid_size, num_heads: facts that neither file nor file name tell; see
                `LlamaGenTransformer.from_original`.
            settings: `class_names`, `guidance_scale`, `top_k`, `temperature`.

        Raises:
            CheckpointError: a file that is missing, damaged, unsafe or of another model.
            InputError: components that do not fit each other.
        """
        transformer = LlamaGenTransformer.from_original(path, grid_size=grid_size, num_heads=num_heads)
        image_tokenizer = vq_model if isinstance(vq_model, VQModel) else VQModel.from_original(vq_model)
        return cls(transformer, image_tokenizer, text_encoder, tokenizer, **settings)

    def compile(self, **options: Any) -> None:
        """Compile the network for fixed shapes: the first call after it takes a minute, later ones less.

        Args:
            options: of `torch.compile`; "reduce-overhead" mode (CUDA graphs) by default on a GPU.
        """
        if not options and self.transformer.device.type == "cuda":
            options = {"mode": "reduce-overhead"}
        self._compiled = torch.compile(self.transformer.transform, fullgraph=True, **options)

    # -- the call --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        guidance_scale: float | None = None,
        guidance_interval: int = -1,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        accelerator: Accelerator | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Make pictures.

        Args:
            prompt: one description or several; for class-conditional models a label or class name.
            guidance_scale: how strictly to follow the prompt; 1 switches guidance off and halves the work.
                The model's own default if None.
            guidance_interval: see `Guidance`.
            num_images_per_prompt: pictures of each prompt, at least 1.
            seed: picture i uses seed + i and can be made again alone with it.
            generator: instead of a seed: one generator, or one per picture.
            temperature, top_k, top_p: see `Sampling`; the model's own defaults if None.
            accelerator: how to decode faster: an `Accelerator`, its name, or None for plain decoding.
            output_type: "pil", "np", "pt", or "latent" for the token codes.
            return_dict: False for a plain tuple (images, stats).
            callback_on_step_end: called after every pass as (pipe, step from 0, tokens decided per picture in
                this pass, {"canvas": canvas}); set `pipe._interrupt = True` in it to stop. Empty places of a
                stopped picture hold code 0.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        prompts = self._prompts(prompt)
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int):
            raise InputError(f"num_images_per_prompt must be an integer, got {num_images_per_prompt!r}.")
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
        if output_type not in OUTPUT_TYPES:
            raise unknown_name("output_type", str(output_type), OUTPUT_TYPES)
        guidance = Guidance(
            self.config.guidance_scale if guidance_scale is None else guidance_scale, guidance_interval
        )
        sampling = Sampling(
            self.config.temperature if temperature is None else temperature,
            self.config.top_k if top_k is None else top_k,
            top_p,
        )
        chosen = resolve_accelerator(accelerator, "llamagen")
        images = len(prompts) * num_images_per_prompt
        generators = picture_generators(images, seed, generator)
        with memory_errors(images):
            return self._generate(
                prompts,
                num_images_per_prompt,
                guidance,
                sampling,
                generators,
                chosen,
                output_type,
                return_dict,
                callback_on_step_end,
            )

    def _generate(
        self,
        prompts: list[str | int],
        num_images_per_prompt: int,
        guidance: Guidance,
        sampling: Sampling,
        generators: list[torch.Generator],
        accelerator: Accelerator,
        output_type: str,
        return_dict: bool,
        callback: StepCallback | None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        device, model = self._execution_device, self.transformer
        clock = Stopwatch(device)
        condition, mask = self._condition(prompts)
        condition = condition.repeat_interleave(num_images_per_prompt, dim=0)
        mask = None if mask is None else mask.repeat_interleave(num_images_per_prompt, dim=0)
        clock.lap("text")

        canvas = Canvas.empty(len(generators), model.num_tokens, device=device)
        sessions: list[CausalSession] = []

        def open_session(network: Any = None, **options: Any) -> CausalSession:
            fixed = self._compiled is not None and network is None
            sessions.append(
                CausalSession(
                    model if network is None else network,
                    condition,
                    mask,
                    guidance=guidance,
                    sampling=sampling,
                    static_shapes=fixed,
                    transform=self._compiled if fixed else None,
                    **options,
                )
            )
            return sessions[-1]

        self._interrupt = False
        passes = 0
        tally: Tally | None = None
        with self.progress_bar(total=100) as bar:

            def on_step(step: Step) -> None:
                nonlocal passes
                passes = step.number
                bar.update(int(100 * step.progress) - bar.n)
                if callback is not None:
                    callback(self, step.number - 1, step.decided, {"canvas": step.canvas})
                if self._interrupt:
                    raise Interrupted

            randomness = Randomness.draw(generators, canvas.num_positions, device)
            job = Job(
                open_session,
                model,
                model.config.grid_size,
                model.config.vocab_size,
                canvas,
                canvas.batch * (2 if guidance.enabled else 1),
                randomness,
                on_step,
                neighbours=self._neighbours,
                drafters=self.drafters,
            )
            accelerator = accelerator.resolve(job)
            with contextlib.suppress(Interrupted):
                counts = accelerator.run(job)
                tally = counts if isinstance(counts, Tally) else None
        clock.lap("tokens")

        size = model.config.grid_size
        codes = canvas.tokens.unflatten(1, (size, size))
        if output_type == "latent":
            pictures: Any = codes
        else:
            pictures = to_output(self.vq_model.decode_codes(codes), output_type)
        clock.lap("decode")
        self.maybe_free_model_hooks()
        stats = Statistics(
            accelerator=accelerator.name,
            options=accelerator.options(),
            lossless=accelerator.keeps_law,
            images=canvas.batch,
            tokens=model.num_tokens,
            passes=passes,
            rows=sessions[0].rows_per_pass,
            cache_bytes=sum(s.cache.nbytes for s in sessions),
            seconds=clock.laps,
            **_of_tally(tally),
            device=str(device),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        if not return_dict:
            return pictures, stats
        return ImageOutput(images=pictures, stats=stats, written=canvas.written.unflatten(1, (size, size)))

    # -- conditions ------------------------------------------------------------------------------------

    def _prompts(self, prompt: str | int | Sequence[str | int]) -> list[str | int]:
        prompts = [prompt] if isinstance(prompt, (str, int)) else list(prompt)
        if not prompts:
            raise InputError("there is no prompt; give at least one.")
        return prompts

    def _condition(self, prompts: list[str | int]) -> tuple[Tensor, Tensor | None]:
        model, device = self.transformer, self._execution_device
        if model.config.model_type == "c2i":
            return torch.tensor([self.class_label(p) for p in prompts], device=device), None
        wrong = next((p for p in prompts if not isinstance(p, str)), None)
        if wrong is not None:
            raise InputError(f"this model takes descriptions, not labels; got {wrong!r}.")
        text = encode_prompts(
            self.tokenizer,
            self.text_encoder,
            [str(p) for p in prompts],
            max_length=model.prefix_length,
            device=device,
            dtype=model.dtype,
        )
        self._warn_of_unknown_words([str(p) for p in prompts])
        return text.features, text.mask

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


def _of_tally(tally: Tally | None) -> dict[str, Any]:
    """A tally as fields of the statistics."""
    if tally is None:
        return {}
    accepted = tally.accepted / tally.attempts.clamp(min=1)
    return {
        "picture_passes": tuple(tally.passes.tolist()),
        "accepted": tuple(accepted.tolist()),
        "draft_passes": tally.draft_passes,
    }


class Stopwatch:
    """Wall-clock time by phase; waits for the device at the borders of phases only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
