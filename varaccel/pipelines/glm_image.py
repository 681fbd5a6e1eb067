"""Images from prompts with GLM-Image: tokens by any accelerator, then diffusers' own decoder of them."""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.accelerators import AnyAccelerator
from varaccel.engine.options import check_number, positive_integer
from varaccel.engine.statistics import Statistics
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.job import CausalJob
from varaccel.models.transformers_host.glm_image import GlmImageHost
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.pipelines.base import Run
from varaccel.pipelines.causal import CausalSettings
from varaccel.pipelines.generate_call import GenerateArguments, ImageCall
from varaccel.pipelines.image_sizes import whole_tokens
from varaccel.pipelines.load_options import LoadOptions
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.sized_host import SizedTransformersPipeline
from varaccel.pipelines.step_callback import StepCallback
from varaccel.tokenizers.glm_image_vq import GlmImageVocabulary

DECODER = ("text_encoder", "tokenizer", "dit", "vae", "scheduler")
"""Components that make pixels of tokens."""

_OWN_NAMES = {"vision_language_encoder": "model", "transformer": "dit"}
"""What components of diffusers' pipeline are called here, where names differ: a transformer decides tokens."""
_THEIR_NAMES = {own: theirs for theirs, own in _OWN_NAMES.items()}


@dataclass(frozen=True)
class GlmImageSettings(CausalSettings):
    """What a call says of the tokens, and of the pixels that are made of them.

    Attributes:
        num_inference_steps: denoising steps of the decoder.
        decoder_guidance_scale: guidance of the decoder; 1 switches it off.
    """

    num_inference_steps: int = 50
    decoder_guidance_scale: float = 1.5


class GlmImagePipeline(SizedTransformersPipeline):
    """`GlmImageForConditionalGeneration` and the diffusion decoder of the repository `zai-org/GLM-Image`.

    The model draws a preview grid of about 256 tokens, then the image, 32 × 32 pixels per token. diffusers'
    `GlmImagePipeline` makes pixels of them: `to_diffusers()` is that pipeline on the same components.

    Args:
        model, processor: as transformers loads them.
        text_encoder, tokenizer: read the texts that are to be seen in an image (quoted in the prompt).
        dit, vae, scheduler: of the diffusion decoder; the `transformer` of diffusers' pipeline is `dit` here. A
            pipeline without these five draws tokens, for `output_type="latent"`.
        guidance_scale: 1 or None, see `__call__`.
        height, width, num_inference_steps, decoder_guidance_scale: defaults of a call.

    Raises:
        InputError: components that do not fit each other, or some of the decoder's but not all.
    """

    family: ClassVar[str] = "glm_image"
    model_type: ClassVar[str] = "glm_image"
    model_class: ClassVar[str] = "GlmImageForConditionalGeneration"
    processor_class: ClassVar[str] = "GlmImageProcessor"
    host_class: ClassVar[type[TransformersHost]] = GlmImageHost
    sampling_defaults: ClassVar[dict[str, float]] = {
        "guidance_scale": 1.0,
        "temperature": 0.9,
        "top_k": 0,
        "top_p": 0.75,
    }
    preview_steps: ClassVar[int] = 8
    """Most denoising steps of the images that `shown["preview"]()` of a callback makes."""
    model_cpu_offload_seq = "model->text_encoder->dit->vae"
    _optional_components = ["eagle_head", "draft_model", *DECODER]  # noqa: RUF012

    dit: Any
    vae: Any
    scheduler: Any

    def __init__(
        self,
        model: Any,
        processor: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        dit: Any = None,
        vae: Any = None,
        scheduler: Any = None,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        decoder_guidance_scale: float = 1.5,
        eagle_head: Any = None,
        draft_model: Any = None,
    ) -> None:
        if guidance_scale is not None:
            self._guidance(guidance_scale, -1)
        whole_tokens(height, width, GlmImageVocabulary.downsample_factor)
        super().__init__(
            model, processor, None, top_k, temperature, top_p, eagle_head=eagle_head, draft_model=draft_model
        )
        decoder = dict(zip(DECODER, (text_encoder, tokenizer, dit, vae, scheduler), strict=True))
        missing = [name for name, part in decoder.items() if part is None]
        if 0 < len(missing) < len(DECODER):
            raise InputError(
                f"the decoder of a GlmImagePipeline lacks {', '.join(missing)}; pass {', '.join(DECODER)}, or none of "
                "them for tokens alone."
            )
        if dit is not None:
            known = getattr(dit.config, "prior_vq_quantizer_codebook_size", None)
            if known != self.transformer.vocab_size:
                raise InputError(
                    f"the model draws {self.transformer.vocab_size} token ids and the dit reads {known}; take both "
                    "from one repository."
                )
        self.register_modules(**decoder)
        self.register_to_config(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            decoder_guidance_scale=decoder_guidance_scale,
        )

    def _begin(self) -> None:
        super()._begin()
        self._known_grids: dict[tuple[int, int], tuple[Grid, ...]] = {}

    @classmethod
    def _image_tokenizer(cls, model: Any, processor: Any) -> GlmImageVocabulary:
        return GlmImageVocabulary(model.model.vqmodel)

    # -- the call --------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        negative_prompt: str | int | Sequence[str | int] | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_interval: int = -1,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        accelerator: AnyAccelerator | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Make images; arguments that are not named here are those of `CausalPipeline`.

        An image depends on its own seed and prompt alone: tokens, and the noise that its decoding starts from.

        Args:
            height, width: of the images in pixels, multiples of 32.
            negative_prompt, guidance_scale: not for this model: it was trained without an empty prompt, so its tokens
                have no guidance.
            num_inference_steps: denoising steps of the decoder.
            decoder_guidance_scale: guidance of the decoder, `guidance_scale` of diffusers' pipeline; 1 switches it off.
            output_type: "latent" for the token ids of the image, [B, height / 32, width / 32].
            callback_on_step_end: see `StepCallback`. A preview is decoded when it is asked for, in at most
                `preview_steps` steps; what is not decided yet is taken from the model's preview grid.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        if output_type != "latent":
            self._check_decoder()
        settings = GlmImageSettings(
            self._guidance(guidance_scale, guidance_interval),
            self._sampling(temperature, top_k, top_p),
            negative_prompts=self._negative_prompts(negative_prompt),
            size=self._call_size(height, width, ratio),
            num_inference_steps=positive_integer(
                "num_inference_steps",
                self.config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            ),
            decoder_guidance_scale=check_number(
                "decoder_guidance_scale",
                self.config.decoder_guidance_scale
                if decoder_guidance_scale is None
                else decoder_guidance_scale,
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
            batch_size=batch_size,
        )
        return self._generate(call, settings)

    def _guidance(self, scale: float | Sequence[float] | None, interval: int) -> Guidance:
        guidance = super()._guidance(scale, interval)
        if guidance.enabled:
            raise InputError(
                f"GLM-Image draws its tokens without guidance, got guidance_scale {scale}; use decoder_guidance_scale, "
                "the guidance of its decoder."
            )
        return guidance

    def _negative_prompts(
        self, given: str | int | Sequence[str | int] | None
    ) -> tuple[str | int, ...] | None:
        if given is not None:
            raise InputError("GLM-Image draws its tokens without guidance; leave negative_prompt out.")
        return None

    def _without_prompt(self, settings: CausalSettings) -> Condition:
        raise InputError("GLM-Image draws nothing without a prompt; say what to paint.")

    # -- prompts and grids -----------------------------------------------------------------------------

    def _check_size(self, size: tuple[int, int]) -> None:
        self._grids_of(size)

    def _grids_of(self, size: tuple[int, int]) -> tuple[Grid, ...]:
        """Grids of an image of (height, width) pixels in the order in which they are drawn: preview, then image.

        Raises:
            InputError: an image so narrow that nothing is left of its preview.
        """
        if size not in self._known_grids:
            listed = torch.as_tensor(self._inputs("", size)["image_grid_thw"])  # the image first
            self._known_grids[size] = _in_order(listed)
        grids = self._known_grids[size]
        if any(grid.num_positions == 0 for grid in grids):
            raise InputError(
                f"{size[0]} × {size[1]} pixels are too narrow for this model; take sides that differ less."
            )
        return grids

    def _inputs(self, prompt: str, size: tuple[int, int]) -> Mapping[str, Any]:
        """What the processor makes of a prompt: the template, the sizes of both grids, the token before the image."""
        sizes: dict[str, Any] = {"target_h": size[0], "target_w": size[1]}
        if getattr(self.processor, "chat_template", None) is None:
            inputs: Mapping[str, Any] = self.processor(text=[prompt], **sizes)
            return inputs
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        template = self.processor.apply_chat_template
        if "processor_kwargs" in inspect.signature(template).parameters:  # in newer versions of transformers
            sizes = {"processor_kwargs": sizes}
        inputs = template([[message]], tokenize=True, return_dict=True, **sizes)
        return inputs

    def _prompt_ids(self, prompt: str, size: tuple[int, int] | None) -> Sequence[int]:
        return list(self._inputs(prompt, size or self._size(None, None))["input_ids"][0])

    def _grids(self, run: Run[CausalSettings, CausalJob]) -> tuple[Grid, ...]:
        assert run.settings.size is not None
        return self._grids_of(run.settings.size)

    # -- inside generate() -----------------------------------------------------------------------------

    @classmethod
    def generate_options(cls, model: Any, options: dict[str, Any]) -> dict[str, Any] | None:
        # editing an image stays with the model's own code, as text does
        for_image = options.get("image_grid_thw") is not None and options.get("pixel_values") is None
        return options if for_image else None

    @classmethod
    def read_generate(cls, host: Any, arguments: GenerateArguments) -> ImageCall:
        listed = arguments.inputs.get("image_grid_thw")
        if listed is None or arguments.inputs.get("pixel_values") is not None:
            raise InputError(
                "accelerated generate() draws images of prompts; pass what the processor makes of a prompt."
            )
        counts = arguments.inputs.get("images_per_sample")
        of_rows = listed.split([len(listed)] if counts is None else counts.tolist())
        arguments.check_one_size(torch.equal(rows, of_rows[0]) for rows in of_rows)
        grids = _in_order(of_rows[0])
        tokens = sum(grid.num_positions for grid in grids)
        most = arguments.most_tokens(tokens)
        prompts, end = arguments.input_ids, host.model.config.image_end_token_id

        def finish(drawn: Tensor) -> Tensor:
            parts = [prompts, drawn]
            if most is not None and most > tokens:
                parts.append(torch.full_like(drawn[:, :1], end))
            return torch.cat(parts, 1)

        return ImageCall(
            Condition(prompts, arguments.mask), grids, Guidance(1.0), arguments.sampling(), finish
        )

    # -- pixels ----------------------------------------------------------------------------------------

    def to_diffusers(self) -> DiffusionPipeline:
        """diffusers' `GlmImagePipeline` on the components of this one, which share their weights.

        Its scheduler is a new one: schedulers count their steps, and pipelines may run beside each other.

        Raises:
            InputError: a pipeline without the decoder.
        """
        self._check_decoder()
        theirs: DiffusionPipeline = diffusers.GlmImagePipeline(
            tokenizer=self.tokenizer,
            processor=self.processor,
            text_encoder=self.text_encoder,
            vision_language_encoder=self.model,
            vae=self.vae,
            transformer=self.dit,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
        )
        theirs.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return theirs

    def _check_decoder(self) -> None:
        if self.dit is None:
            raise InputError(
                "this GlmImagePipeline has no decoder, so it draws tokens alone; ask for output_type='latent', or load "
                f"the whole repository with {', '.join(DECODER)}."
            )

    def _decoding(self, run: Run[CausalSettings, CausalJob]) -> GlmImageSettings:
        """The call's settings, with the defaults of the decoder if the call says nothing of it."""
        settings = run.settings
        if isinstance(settings, GlmImageSettings):
            return settings
        own = {name: self.config[name] for name in ("num_inference_steps", "decoder_guidance_scale")}
        return GlmImageSettings(**{f.name: getattr(settings, f.name) for f in fields(settings)}, **own)

    def _as_it_stands(self, run: Run[CausalSettings, CausalJob]) -> Run[CausalSettings, CausalJob]:
        still, settings = super()._as_it_stands(run), self._decoding(run)
        steps = min(settings.num_inference_steps, self.preview_steps)
        still.settings = replace(settings, num_inference_steps=steps)
        return still

    def _pixels(self, run: Run[CausalSettings, CausalJob]) -> Tensor:
        settings = self._decoding(run)
        assert settings.size is not None
        height, width = settings.size
        theirs: Any = self.to_diffusers()
        # in about [-1, 1], as the VAE gives them
        theirs.image_processor = VaeImageProcessor(
            vae_scale_factor=theirs.vae_scale_factor, do_normalize=False
        )
        tokens = self._shown_tokens(run)
        # the decoder reads a token for every 16 × 16 pixels
        prior = tokens.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        texts, device = self._texts(theirs, run), theirs._execution_device
        noise = run.job.randomness.generators()
        images: list[Tensor | None] = [None] * len(texts)
        for rows in _alike(texts):
            drawn = theirs(
                prompt_embeds=torch.cat([texts[row] for row in rows]),
                prior_token_ids=prior[rows].to(device),
                height=height,
                width=width,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.decoder_guidance_scale,
                generator=[noise[row] for row in rows],
                output_type="pt",
            ).images
            for row, image in zip(rows, drawn, strict=True):
                images[row] = image
        return torch.stack([image for image in images if image is not None])

    def _shown_tokens(self, run: Run[CausalSettings, CausalJob]) -> Tensor:
        """[B, h, w] tokens of the image; places that are still empty take those of the preview grid."""
        tokens, written = self._latents(run), self._written(run)
        grids = self._grids(run)
        if len(grids) < 2 or bool((written > 0).all()):
            return tokens
        start = sum(grid.num_positions for grid in grids[:-2])
        preview = run.canvas.tokens[:, start : start + grids[-2].num_positions]
        preview = preview.unflatten(1, (grids[-2].height, grids[-2].width))
        coarse = F.interpolate(preview[:, None].double(), tokens.shape[1:], mode="nearest")[:, 0].long()
        return tokens.where(written > 0, coarse)

    def _texts(self, theirs: Any, run: Run[CausalSettings, CausalJob]) -> list[Tensor]:
        """[1, T, D] features of the quoted texts for each image."""
        features = {
            prompt: theirs.encode_prompt(
                str(prompt),
                do_classifier_free_guidance=False,
                device=theirs._execution_device,
                dtype=theirs.dtype,
            )[0]
            for prompt in dict.fromkeys(run.call.prompts)
        }
        return [features[p] for p in run.call.prompts for _ in range(run.call.num_images_per_prompt)]

    # -- loading ---------------------------------------------------------------------------------------

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Self:
        """A pipeline on the components of another, diffusers' `GlmImagePipeline` included; see `LoadablePipeline`."""
        if isinstance(pipeline, diffusers.GlmImagePipeline):
            parts = {_OWN_NAMES.get(name, name): part for name, part in pipeline.components.items()}
            options = {**parts, **options}
        return super().from_pipe(pipeline, **options)

    @classmethod
    def _from_pipeline_folder(
        cls, folder: Path, options: dict[str, Any], model_options: Mapping[str, Any]
    ) -> Self:
        if "vision_language_encoder" not in json.loads((folder / "model_index.json").read_text("utf-8")):
            return super()._from_pipeline_folder(folder, options, model_options)
        return cls._from_diffusers_folder(folder, LoadOptions.of(options), model_options)

    @classmethod
    def _from_diffusers_folder(
        cls, folder: Path, chosen: LoadOptions, model_options: Mapping[str, Any]
    ) -> Self:
        """A pipeline of a folder in the layout of diffusers' `GlmImagePipeline`."""
        parts = dict(chosen.parts)
        if model_options and "model" not in parts:
            if "quantization_config" in chosen.reading:
                raise InputError(
                    f"a PipelineQuantizationConfig and {', '.join(model_options)} do not go together; load the model "
                    "with transformers and pass it as model=."
                )
            parts["model"] = cls._load_model(folder / "vision_language_encoder", chosen, **model_options)
        # what is there already is not to be loaded, and diffusers would print a model that it does not know
        given = {
            _THEIR_NAMES.get(name, name): None for name in ("model", "processor", *DECODER) if name in parts
        }
        dtypes = chosen.dtype
        if isinstance(dtypes, dict):
            dtypes = {_THEIR_NAMES.get(name, name): dtype for name, dtype in dtypes.items()}
        try:
            theirs = diffusers.GlmImagePipeline.from_pretrained(
                folder, **chosen.reading, **({} if dtypes is None else {"dtype": dtypes}), **given
            )
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
        pipe = cls.from_pipe(theirs, **parts)
        if chosen.device is not None:
            pipe.to(chosen.device)
        elif "device_map" in model_options:
            pipe._decoder_to(pipe.transformer.device)
        return pipe

    def _decoder_to(self, device: torch.device) -> None:
        for name in DECODER:
            part = getattr(self, name)
            if isinstance(part, nn.Module):
                part.to(device)


def _in_order(listed: Tensor) -> tuple[Grid, ...]:
    """Grids in the order in which they are drawn, of rows (1, height, width) that are listed the other way round."""
    return tuple(Grid(height, width) for _, height, width in reversed(listed.tolist()))


def _alike(texts: Sequence[Tensor]) -> list[list[int]]:
    """Rows of equally long texts: in one batch the decoder would read the padding of shorter ones as text."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        groups[text.shape[1]].append(row)
    return list(groups.values())
