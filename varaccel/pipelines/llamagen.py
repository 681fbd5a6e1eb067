"""Images from prompts or classes with LlamaGen (arXiv 2406.06525)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from varaccel.accelerators import Accelerator
from varaccel.engine.job import Job
from varaccel.engine.loop import OnStep, Step
from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.causal.schedule import Raster
from varaccel.hosts.causal.session import CausalSession
from varaccel.models.eagle import EagleHead
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.pipelines.base import Run, StepCallback, TokenPipeline
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.pixels import to_output
from varaccel.speculation.network_drafter import check_same_codes
from varaccel.tokenizers.neighbours import neighbour_table
from varaccel.tokenizers.vq import VQModel


@dataclass(frozen=True)
class LlamaGenSettings:
    """What a call says about the distributions of tokens."""

    guidance: Guidance
    sampling: Sampling


class LlamaGenPipeline(TokenPipeline):
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

    family: ClassVar[str] = "llamagen"
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
        self._tables: dict[bool, Tensor] = {}
        self._compiled: Callable[..., Tensor] | None = None

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
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
        """Make images.

        Args:
            prompt: one description or several; for class-conditional models a label or class name.
            guidance_scale: how strictly to follow the prompt; 1 switches guidance off and halves the work.
                The model's own default if None.
            guidance_interval: see `Guidance`.
            num_images_per_prompt: images of each prompt, at least 1.
            seed: image i uses seed + i and can be made again alone with it.
            generator: instead of a seed: one generator, or one per image.
            temperature, top_k, top_p: see `Sampling`; the model's own defaults if None.
            accelerator: how to decode faster: an `Accelerator`, its name, or None for plain decoding.
            output_type: "pil", "np", "pt", "raw" (see `to_output`), or "latent" for the token codes.
            return_dict: False for a plain tuple (images, stats).
            callback_on_step_end: called after every pass as (pipe, step from 0, tokens decided per image in
                this pass, {"canvas": canvas, "preview": function, "written": function}); `preview()` decodes what
                there is to images of `output_type` (arrays if that is "latent"), `written()` is
                `ImageOutput.written` so far. Set `pipe._interrupt = True` in it to stop. Empty places hold code 0.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        settings = LlamaGenSettings(
            Guidance(
                self.config.guidance_scale if guidance_scale is None else guidance_scale, guidance_interval
            ),
            Sampling(
                self.config.temperature if temperature is None else temperature,
                self.config.top_k if top_k is None else top_k,
                top_p,
            ),
        )
        call = self._checked_call(
            prompt,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            accelerator=accelerator,
            output_type=output_type,
            return_dict=return_dict,
            callback=callback_on_step_end,
        )
        return self._generate(call, settings)

    # -- what the base asks for ------------------------------------------------------------------------

    def _condition(self, prompts: list[str | int]) -> tuple[Tensor, Tensor | None]:
        if self.transformer.config.model_type == "c2i":
            return self._labels(prompts), None
        text = self._text(prompts, self.transformer.prefix_length)
        return text.features, text.mask

    def _open_session(self, run: Run, network: Any = None, **options: Any) -> CausalSession:
        compiled = self._compiled is not None and network is None
        return CausalSession(
            self.transformer if network is None else network,
            run.condition,
            run.mask,
            guidance=run.settings.guidance,
            sampling=run.settings.sampling,
            static_shapes=compiled,
            transform=self._compiled if compiled else None,
            **options,
        )

    def _make_job(self, run: Run, open_session: Callable[..., Any], randomness: Any, on_step: OnStep) -> Job:
        config = self.transformer.config
        return Job(
            open_session,
            self.transformer,
            config.grid_size,
            config.vocab_size,
            run.canvas,
            run.canvas.batch * (2 if run.settings.guidance.enabled else 1),
            randomness,
            Raster(),
            on_step,
            # an image tokenizer of the user's own may know no nearness of codes
            neighbours=self._neighbours if hasattr(self.vq_model, "quantize") else None,
            drafters=self.drafters,
        )

    def _images(self, run: Run) -> Any:
        if run.call.output_type == "latent":
            return self._as_grid(run.canvas.tokens)
        return self._decoded(run)

    def _preview(self, run: Run, step: Step) -> Any:
        return self._decoded(run)

    def _decoded(self, run: Run) -> Any:
        codes = self._as_grid(run.canvas.tokens)
        return to_output(self.vq_model.decode_codes(codes), run.call.output_type)

    def _written(self, run: Run) -> Tensor:
        return self._as_grid(run.canvas.written)

    def _as_grid(self, values: Tensor) -> Tensor:
        """[B, N] -> [B, h, w]."""
        size = self.transformer.config.grid_size
        return values.unflatten(1, (size, size))
