"""Images from classes or prompts with VAR (arXiv 2404.02905), and zero-shot editing of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from varaccel.accelerators import AnyAccelerator
from varaccel.engine.options import positive_integer
from varaccel.engine.randomness import Randomness
from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.hosts.next_scale.feature_map import Noise
from varaccel.hosts.next_scale.job import Draws, ScaleJob
from varaccel.hosts.next_scale.published_rng import PublishedDraws
from varaccel.hosts.next_scale.sampling import ScaleGuidance, ScaleSampling
from varaccel.models.var import VARTransformer
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.pipelines.base import NO_PROMPT, Run
from varaccel.pipelines.next_scale import NextScalePipeline, ScaleSettings, published_seed
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.step_callback import StepCallback
from varaccel.tokenizers.multiscale_vq import MultiScaleQuantizer, MultiScaleVQModel


class VARPipeline(NextScalePipeline):
    """Class- or text-conditional generation with a VAR transformer and any accelerator for it.

    Args:
        transformer: the next-scale model.
        vq_model: the multi-scale image tokenizer whose tokens it predicts.
        text_encoder, tokenizer: for text-conditional models, see `varaccel.tokenizers.text`.
        refiner: a smaller transformer of the same scales, vocabulary and conditions, for `CoDe`.
        class_names: for class-conditional models, names that can be used instead of labels.
        guidance_scale, top_k, top_p, temperature: defaults of a call.

    Raises:
        InputError: components that do not fit each other.
    """

    family: ClassVar[str] = "var"
    _optional_components = ["text_encoder", "tokenizer", "refiner"]  # noqa: RUF012

    transformer: VARTransformer
    vq_model: MultiScaleVQModel
    refiner: VARTransformer | None

    def __init__(
        self,
        transformer: VARTransformer,
        vq_model: MultiScaleVQModel,
        text_encoder: Any = None,
        tokenizer: Any = None,
        refiner: VARTransformer | None = None,
        class_names: Sequence[str] | None = None,
        guidance_scale: float = 2.5,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        for network in filter(None, (transformer, refiner)):
            self._check_network(network, "next-scale")
            check_tokenizer(network, vq_model)
        self._check_text(transformer.signature(), text_encoder, tokenizer)
        self.register_modules(
            transformer=transformer,
            vq_model=vq_model,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            refiner=refiner,
        )
        self.register_to_config(
            class_names=None if class_names is None else list(class_names),
            guidance_scale=guidance_scale,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
        )

    @property
    def schedule(self) -> ScaleSchedule:
        return self.transformer.schedule

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.vq_model.image_size

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        vq_model: MultiScaleVQModel | str | os.PathLike[str],
        refiner: VARTransformer | str | os.PathLike[str] | None = None,
        depth: int | None = None,
        **settings: Any,
    ) -> Self:
        """Build a pipeline from published files.

        Args:
            path: the transformer's checkpoint, such as `var_d30.pth` or CoDe's `drafter_8.pth`.
            vq_model: the image tokenizer, or its file, `vae_ch160v4096z32.pth`.
            refiner: a smaller transformer or its file, such as `var_d16.pth` or `refiner_8.pth`.
            depth: refuse a file of another depth.
            settings: `class_names`, `guidance_scale`, `top_k`, `top_p`, `temperature`; `dtype`, `device_map`.

        Raises:
            CheckpointError: a file that is missing, damaged, unsafe or of another model.
            InputError: components that do not fit each other, an unknown option.
        """
        transformer = VARTransformer.from_original(path, depth=depth)
        if isinstance(vq_model, MultiScaleVQModel):
            image_tokenizer = vq_model
        else:
            image_tokenizer = MultiScaleVQModel.from_original(vq_model, scales=transformer.schedule.sides)
        small = (
            refiner
            if refiner is None or isinstance(refiner, VARTransformer)
            else VARTransformer.from_original(refiner)
        )
        components = {"transformer": transformer, "vq_model": image_tokenizer, "refiner": small}
        return cls._of_single_files(components, settings)

    # -- the calls -------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | None = None,
        smooth: bool = False,
        published_rng: bool = False,
        cache_dtype: torch.dtype | None = None,
        accelerator: AnyAccelerator | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Make images.

        Args:
            prompt: one description or several; for class-conditional models a label or class name.
            guidance_scale: how strictly to follow the prompt, see `ScaleGuidance`; 1 switches guidance off and
                halves the work. The model's own default if None.
            num_images_per_prompt: images of each prompt, at least 1.
            batch_size: images that are decoded at once, at most, which bounds memory; all if None. No image depends on
                it but for rounding.
            seed: image i uses seed + i and can be made again alone with it.
            generator: instead of a seed: one generator, or one per image.
            temperature, top_k, top_p: see `ScaleSampling`; the model's own defaults if None.
            smooth: soften the code vectors, for looks; not for figures (VAR's "more smooth" sampling).
            published_rng: draw as the published code does from `seed`: the same images on the same kind of
                device, but an image then depends on its batch.
            cache_dtype: number type of stored keys and values, such as `torch.bfloat16`; the network's if None.
            accelerator: how to decode faster: an `Accelerator`, its name, or None for plain decoding.
            output_type: "pil", "np", "pt", "raw" (see `to_output`), or "latent" for the token ids [B, L].
            return_dict: False for a plain tuple (images, stats).
            callback_on_step_end: called after every scale as (pipe, scale from 0, its tokens, what is shown), see
                `StepCallback`. Set `pipe._interrupt = True` in it to stop; the images then show the scales that are
                there.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        settings = ScaleSettings(
            self._guidance(guidance_scale),
            self._sampling(temperature, top_k, top_p),
            self.transformer.schedule,
            smooth,
            published_seed(published_rng, seed),
            cache_dtype,
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
        guidance_scale: float | None = None,
        num_images: int = 1,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | None = None,
        smooth: bool = False,
        accelerator: AnyAccelerator | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Paint a part of an image anew, without training for it (VAR, section 5.3).

        Tokens outside the mask are those of the image. They went through the image tokenizer, so that they come
        back close to what they were, not equal.

        Args:
            image: a PIL image, array or tensor of any size and kind, see `rgb_image`; a centred square of it is
                kept, scaled to the model's size.
            mask: white where to paint, see `marked_pixels`; of the whole image, of its size or scaled evenly.
            prompt: what to paint: a description, or a class (class-conditional editing); None for whatever fits
                (in-painting).
            num_images: versions to make; version i uses seed + i.
            guidance_scale, seed, generator, temperature, top_k, top_p, smooth, accelerator, output_type,
                return_dict, callback_on_step_end: as in a call. Without a prompt there is nothing to guide to.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        num_images = positive_integer("num_images", num_images)
        settings = ScaleSettings(
            self._guidance(1.0 if prompt is None else guidance_scale),
            self._sampling(temperature, top_k, top_p),
            self.transformer.schedule,
            smooth,
            source=self._source(image, mask),
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

    def _guidance(self, scale: float | Sequence[float] | None) -> ScaleGuidance:
        guidance = ScaleGuidance(self.config.guidance_scale if scale is None else scale)
        guidance.check(self.transformer.schedule)
        return guidance

    def _sampling(self, temperature: Any, top_k: Any, top_p: float | None) -> ScaleSampling:
        sampling = ScaleSampling(
            self.config.temperature if temperature is None else temperature,
            self.config.top_k if top_k is None else top_k,
            self.config.top_p if top_p is None else top_p,
        )
        sampling.check(self.transformer.schedule)
        return sampling

    # -- what the base asks for ------------------------------------------------------------------------

    def _quantizer(self, schedule: ScaleSchedule) -> MultiScaleQuantizer:
        return self.vq_model.quantize

    def _draws(self, run: Run[ScaleSettings, ScaleJob]) -> tuple[Draws, Noise | None]:
        seed = run.settings.published_seed
        draws: Randomness | PublishedDraws
        if seed is None:
            draws = Randomness.draw(run.call.generators, run.canvas.num_positions, run.device)
        else:
            draws = PublishedDraws(torch.Generator(run.device).manual_seed(seed))
        return draws, draws.gumbel(self.vq_model.codebook_size) if run.settings.smooth else None

    def _encode_scales(self, images: Tensor, schedule: ScaleSchedule) -> Tensor:
        return self._encode(images)

    def _pixel_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        return self.image_size, self.image_size


def check_tokenizer(network: VARTransformer, vq_model: MultiScaleVQModel) -> None:
    """Refuse a transformer that was made for another image tokenizer.

    Raises:
        InputError: other scales, another number of codebook entries or another width of them.
    """
    if network.schedule != vq_model.schedule:
        raise InputError(
            f"the transformer's scales {list(network.schedule.sides)} are not the image tokenizer's "
            f"{list(vq_model.schedule.sides)}; load the tokenizer with the transformer's scales."
        )
    sizes = (network.config.vocab_size, network.config.codebook_dim)
    own = (vq_model.config.codebook_size, vq_model.config.codebook_dim)
    if sizes != own:
        raise InputError(
            f"the transformer is made for {sizes[0]} codebook entries of {sizes[1]} numbers "
            f"but the image tokenizer has {own[0]} of {own[1]}; "
            "use the tokenizer that the transformer was trained with."
        )
