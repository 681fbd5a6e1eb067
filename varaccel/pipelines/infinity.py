"""Images from prompts with Infinity (arXiv 2412.04431), in many aspect ratios, and zero-shot editing of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from varaccel.accelerators import AnyAccelerator
from varaccel.engine.network import check_substitute
from varaccel.engine.options import as_integer, positive_integer
from varaccel.engine.randomness import Randomness
from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.hosts.next_scale.bit_sampling import BitDraws, BitSampling, PublishedBitDraws
from varaccel.hosts.next_scale.feature_map import Noise
from varaccel.hosts.next_scale.job import Draws, ScaleJob
from varaccel.hosts.next_scale.sampling import ScaleGuidance
from varaccel.models.infinity import InfinityTransformer
from varaccel.nn.aspect_schedules import SIZES, TEMPLATES, infinity_schedule, nearest_ratio
from varaccel.nn.condition import Condition
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.pipelines.base import NO_PROMPT, Call, Run
from varaccel.pipelines.image_sizes import parse_ratio
from varaccel.pipelines.next_scale import NextScalePipeline, ScaleSettings, published_seed
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.step_callback import StepCallback
from varaccel.tokenizers.bitwise_vq import BitwiseQuantizer, BitwiseVQModel
from varaccel.tokenizers.text import encode_prompts


@dataclass(frozen=True)
class InfinitySettings(ScaleSettings):
    """What a call of this family needs to know.

    Attributes:
        negative: what guidance leads away from, one text or one per prompt; None for the model's own features of
            nothing.
    """

    negative: tuple[str, ...] | None = None


class InfinityPipeline(NextScalePipeline):
    """Text-conditional generation with an Infinity transformer and any accelerator for next-scale models.

    Args:
        transformer: the next-scale model.
        vq_model: the bitwise image tokenizer whose bits it predicts.
        text_encoder, tokenizer: Flan-T5 of transformers, whose features the transformer reads.
        refiner: a smaller transformer of the same bits and text features, for `CoDe`.
        guidance_scale, top_k, top_p, temperature: defaults of a call.
        height, width: of the images in pixels unless a call says otherwise; one of the published sizes.
        scales: height and width of every scale, for a model with a schedule of its own, which then draws images of
            this size only; None for the published schedules.

    Raises:
        InputError: components that do not fit each other, or a size that is not among the published ones.
    """

    family: ClassVar[str] = "infinity"
    cleans_prompts: ClassVar[bool] = False
    _optional_components = ["text_encoder", "tokenizer", "refiner"]  # noqa: RUF012

    transformer: InfinityTransformer
    vq_model: BitwiseVQModel
    refiner: InfinityTransformer | None

    def __init__(
        self,
        transformer: InfinityTransformer,
        vq_model: BitwiseVQModel,
        text_encoder: Any = None,
        tokenizer: Any = None,
        refiner: InfinityTransformer | None = None,
        guidance_scale: float | Sequence[float] = 3.0,
        top_k: int = 0,
        top_p: float = 0.97,
        temperature: float | Sequence[float] = 0.5,
        height: int = 1024,
        width: int = 1024,
        scales: Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        signature = self._check_network(transformer, "next-scale")
        if signature.token_channels != vq_model.token_bits:
            raise InputError(
                f"the transformer predicts {signature.token_channels} bits per token but the image tokenizer has "
                f"{vq_model.token_bits}; use the tokenizer that the transformer was trained with."
            )
        self._check_text(signature, text_encoder, tokenizer)
        if refiner is not None:
            check_substitute(refiner, transformer, "refiner")
        made = getattr(getattr(text_encoder, "config", None), "d_model", signature.condition_size)
        if made != signature.condition_size:
            raise InputError(
                f"the transformer reads text features of {signature.condition_size} numbers but the text encoder makes "
                f"{made}; use the text encoder that it was trained with, Flan-T5-XL for the "
                "published models."
            )
        self.register_modules(
            transformer=transformer,
            vq_model=vq_model,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            refiner=refiner,
        )
        self.register_to_config(
            guidance_scale=guidance_scale,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            height=height,
            width=width,
            scales=None if scales is None else [list(g) if isinstance(g, Sequence) else g for g in scales],
        )
        self._schedule(None, None, None)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        vq_model: BitwiseVQModel | str | os.PathLike[str],
        text_encoder: Any = None,
        tokenizer: Any = None,
        refiner: InfinityTransformer | str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> Self:
        """Build a pipeline from published files.

        Args:
            path: the transformer's checkpoint, such as `infinity_2b_reg.pth`, or the folder of the 8B model.
            vq_model: the image tokenizer, or its file, such as `infinity_vae_d32reg.pth`.
            text_encoder, tokenizer: Flan-T5-XL from transformers.
            refiner: a smaller transformer or its file.
            settings: `guidance_scale`, `top_k`, `top_p`, `temperature`, `height`, `width`; `dtype`, `device_map`.

        Raises:
            CheckpointError: a file that is missing, damaged, unsafe or of another model.
            InputError: components that do not fit each other, an unknown option.
        """
        transformer = InfinityTransformer.from_original(path)
        if isinstance(vq_model, BitwiseVQModel):
            image_tokenizer = vq_model
        else:
            image_tokenizer = BitwiseVQModel.from_original(vq_model)
            if transformer.config.token_bits == 4 * image_tokenizer.token_bits:
                image_tokenizer.register_to_config(patchify=2)  # no file tells it
        if refiner is not None and not isinstance(refiner, InfinityTransformer):
            refiner = InfinityTransformer.from_original(refiner)
        components = {
            "transformer": transformer,
            "vq_model": image_tokenizer,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "refiner": refiner,
        }
        return cls._of_single_files(components, settings)

    # -- sizes -----------------------------------------------------------------------------------------

    @property
    def schedule(self) -> ScaleSchedule:
        return self._schedule(None, None, None)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels unless a call says otherwise.

        Raises:
            InputError: images that are not square.
        """
        height, width = self._pixel_size(self.schedule)
        if height != width:
            raise InputError(f"the images of this pipeline are no squares: {height} × {width}.")
        return height

    def _schedule(self, height: int | None, width: int | None, ratio: str | None) -> ScaleSchedule:
        """The scales of the images of a call.

        Raises:
            InputError: a size that the model does not draw.
        """
        if ratio is not None and (height is not None or width is not None):
            raise InputError("ratio takes the place of height and width; give one or the other.")
        if self.config.scales is not None:
            return self._own_schedule(height, width, ratio)
        if ratio is not None:
            across, down = parse_ratio(ratio)
            number = len(self.schedule)
            size = next(name for name, scales in SIZES.items() if scales == number)
            return infinity_schedule(nearest_ratio(down, across), size)
        sides = (
            self.config.height if height is None else height,
            self.config.width if width is None else width,
        )
        wanted = tuple(pixels for side in sides if (pixels := as_integer(side)) is not None and pixels > 0)
        if len(wanted) != 2:
            raise InputError(
                f"height and width must be positive whole numbers, got {sides[0]!r} and {sides[1]!r}."
            )
        sizes = dict(self._published_sizes())
        if wanted not in sizes:
            raise InputError(
                f"this model draws no images of {wanted[0]} × {wanted[1]} pixels; {_nearest(wanted, sizes)}"
            )
        return sizes[wanted]

    def _own_schedule(self, height: int | None, width: int | None, ratio: str | None) -> ScaleSchedule:
        schedule = ScaleSchedule(self.config.scales)
        own = self._pixel_size(schedule)
        if ratio is not None or any(
            side is not None and as_integer(side) != pixels
            for side, pixels in zip((height, width), own, strict=True)
        ):
            raise InputError(
                f"this model draws images of {own[0]} × {own[1]} pixels; leave height, width and ratio out."
            )
        return schedule

    def _published_sizes(self) -> Iterator[tuple[tuple[int, int], ScaleSchedule]]:
        """Height and width in pixels of every published schedule, with it."""
        for ratio in TEMPLATES:
            for size in SIZES:
                schedule = infinity_schedule(ratio, size)
                yield self._pixel_size(schedule), schedule

    # -- the calls -------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_layers: Sequence[int] = (0,),
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | None = None,
        published_rng: bool = False,
        cache_dtype: torch.dtype | None = None,
        accelerator: AnyAccelerator | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Make images.

        Args:
            prompt: one description or several.
            negative_prompt: what guidance leads away from, one text or one per prompt; an empty one counts as none.
            height, width: of the images in pixels, one of the published sizes; the pipeline's own if None.
            ratio: instead of them: width to height, such as "16:9": the nearest of the published ratios, at about as
                many pixels as the pipeline's own size.
            guidance_scale: how strictly to follow the prompt, one number or one per scale; 1 switches guidance off and
                halves the work. The model's own default if None.
            guidance_layers: where guidance is applied: 0 to the logits, -k to the stream after the k-th block from the
                end (published insertion layers).
            num_images_per_prompt: images of each prompt, at least 1.
            batch_size: images that are decoded at once, at most, which bounds memory; all if None. No image depends on
                it but for rounding.
            seed: image i uses seed + i and can be made again alone with it.
            generator: instead of a seed: one generator, or one per image.
            temperature, top_k, top_p: see `BitSampling`; the model's own defaults if None.
            published_rng: draw as the published code does from `seed`: the same images on the same kind of
                device, but an image then depends on its batch.
            cache_dtype: number type of stored keys and values, such as `torch.bfloat16`; the network's if None.
            accelerator: how to decode faster: an `Accelerator`, its name, or None for plain decoding.
            output_type: "pil", "np", "pt", "raw" (see `to_output`), or "latent" for the token ids [B, L], the bits of
                each packed into a number (see `unpack_bits`).
            return_dict: False for a plain tuple (images, stats).
            callback_on_step_end: called after every scale as (pipe, scale from 0, its tokens, what is shown), see
                `StepCallback`. Set `pipe._interrupt = True` in it to stop; the images then show the scales that are
                there.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        settings = self._settings(
            self._schedule(height, width, ratio),
            self._guidance(guidance_scale, guidance_layers),
            temperature,
            top_k,
            top_p,
            published_seed=published_seed(published_rng, seed),
            cache_dtype=cache_dtype,
            negative=_texts(negative_prompt),
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

    @torch.no_grad()
    def inpaint(
        self,
        image: Any,
        mask: Any,
        prompt: str | int | None = None,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_images: int = 1,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | None = None,
        accelerator: AnyAccelerator | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Paint a part of an image anew, without training for it, as VAR does (arXiv 2404.02905, section 5.3).

        Tokens outside the mask are those of the image. They went through the image tokenizer, so that they come
        back close to what they were, not equal.

        Args:
            image: a PIL image, array or tensor of any size and kind, see `rgb_image`; the middle of it in the aspect
                of the result is kept, scaled.
            mask: white where to paint, see `marked_pixels`; of the whole image, of its size or scaled evenly.
            prompt: what the image is to show; None for whatever fits.
            num_images: versions to make; version i uses seed + i.
            negative_prompt, height, width, ratio, guidance_scale, seed, generator, temperature, top_k, top_p,
                accelerator, output_type, return_dict, callback_on_step_end: as in a call. Without a prompt there is
                nothing to guide to.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        num_images = positive_integer("num_images", num_images)
        if prompt is None and negative_prompt is not None:
            raise InputError("a negative_prompt needs a prompt; give both or neither.")
        settings = self._settings(
            self._schedule(height, width, ratio),
            self._guidance(1.0 if prompt is None else guidance_scale),
            temperature,
            top_k,
            top_p,
            source=self._source(image, mask),
            negative=_texts(negative_prompt),
        )
        call = self._checked_call(
            NO_PROMPT if prompt is None else prompt,
            num_images_per_prompt=num_images,
            seed=seed,
            generator=generator,
            accelerator=accelerator,
            output_type=output_type,
            return_dict=return_dict,
            callback=callback_on_step_end,
        )
        return self._generate(call, settings)

    def _guidance(self, scale: float | Sequence[float] | None, layers: Sequence[int] = (0,)) -> ScaleGuidance:
        depth = len(self.transformer.blocks)
        if not isinstance(layers, Sequence) or not layers:
            raise InputError(
                f"guidance_layers must be a list of at least one layer, such as (0,), got {layers!r}."
            )
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -depth < layer <= 0:
                raise InputError(
                    f"guidance_layers are 0, for the logits, and -1 to -{depth - 1}, for blocks from the end, "
                    f"got {layer!r}."
                )
        inside = tuple(-layer for layer in layers if layer < 0)
        return ScaleGuidance(
            self.config.guidance_scale if scale is None else scale,
            ramp=False,
            inside=inside,
            on_logits=0 in layers,
        )

    def _settings(
        self,
        schedule: ScaleSchedule,
        guidance: ScaleGuidance,
        temperature: Any,
        top_k: Any,
        top_p: float | None,
        **further: Any,
    ) -> InfinitySettings:
        sampling = BitSampling(
            self.config.temperature if temperature is None else temperature,
            self.config.top_k if top_k is None else top_k,
            self.config.top_p if top_p is None else top_p,
        )
        guidance.check(schedule)
        sampling.check(schedule)
        return InfinitySettings(guidance, sampling, schedule, **further)

    # -- what the base asks for ------------------------------------------------------------------------

    def _call_condition(self, call: Call, settings: ScaleSettings) -> Condition | None:
        negative = settings.negative if isinstance(settings, InfinitySettings) else None
        if negative is not None and len(negative) not in (1, len(call.prompts)):
            raise InputError(
                f"there are {len(negative)} negative prompts for {len(call.prompts)} prompts; give one for all, or one "
                "for each."
            )
        condition = super()._call_condition(call, settings)
        if condition is None or negative is None or not settings.guidance.enabled:
            return condition
        against = self._features(negative)
        if against.batch < condition.batch:
            against = against.repeat_interleave(condition.batch)
        return Condition(condition.values, condition.mask, against)

    def _condition(self, prompts: list[str | int]) -> Condition:
        return self._features(self._descriptions(prompts))

    def _features(self, texts: Sequence[str]) -> Condition:
        """Features of texts as published: of T5 in float32, of as many positions as the longest text has."""
        encoded = encode_prompts(
            self.tokenizer,
            self.text_encoder,
            texts,
            max_length=self.transformer.config.text_tokens,
            device=self._execution_device,
            dtype=torch.float32,
            clean=self.cleans_prompts,
            longest=True,
        )
        return Condition(encoded.features, encoded.mask)

    def _quantizer(self, schedule: ScaleSchedule) -> BitwiseQuantizer:
        return self.vq_model.quantizer(schedule)

    def _draws(self, run: Run[ScaleSettings, ScaleJob]) -> tuple[Draws, Noise | None]:
        seed = run.settings.published_seed
        if seed is not None:
            return PublishedBitDraws(torch.Generator(run.device).manual_seed(seed)), None
        numbers = Randomness.draw(run.call.generators, run.canvas.num_positions, run.device)
        return BitDraws(numbers, self.vq_model.token_bits), None

    def _encode_scales(self, images: Tensor, schedule: ScaleSchedule) -> Tensor:
        self._bring("pixels")
        return self.vq_model.encode_tokens(images.to(self.vq_model.dtype), schedule)

    def _pixel_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        return self.vq_model.image_size(schedule)


def _texts(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"negative_prompt must be a text, or one per prompt, got {given!r}.")
    return texts if any(texts) else None


def _nearest(wanted: tuple[int, int], sizes: dict[tuple[int, int], ScaleSchedule]) -> str:
    """Advice on the published size nearest to one that is none."""
    height, width = min(
        sizes, key=lambda s: abs(s[0] - wanted[0]) / wanted[0] + abs(s[1] - wanted[1]) / wanted[1]
    )
    return f"the nearest size it has is {height} × {width}; pass that, or a ratio such as '16:9'."
