"""Images from classes or prompts with MAR (arXiv 2406.11838): continuous tokens, drawn by a diffusion head."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from varaccel.accelerators import AnyAccelerator
from varaccel.engine.canvas import Canvas
from varaccel.engine.job import Job
from varaccel.engine.loop import OnStep
from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.hosts.masked.cuda_graph import GraphedLoop
from varaccel.hosts.masked.denoising import HeadSampling, Loop, Sampler, Step, denoising_step
from varaccel.hosts.masked.guidance import GuidanceSchedule, MaskedGuidance
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.masked.schedule import CosineGroups, cosine_borders
from varaccel.models.mar import MARTransformer
from varaccel.nn.devices import is_gpu
from varaccel.pipelines.base import Run, TokenPipeline
from varaccel.pipelines.compiled_passes import DENOISING_STEP, MASKED_PASS
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.published import load_network
from varaccel.pipelines.step_callback import StepCallback
from varaccel.tokenizers.kl import load_kl, unpatchify


@dataclass(frozen=True)
class MARSettings:
    """What a call of this family needs to know beside what all calls do.

    Attributes:
        guidance, sampling: of the call.
        iterations: S, in how many groups the tokens are decided.
    """

    guidance: MaskedGuidance
    sampling: HeadSampling
    iterations: int


class MARPipeline(TokenPipeline[MARSettings, MaskedJob]):
    """Class- or text-conditional generation with a MAR transformer and any accelerator for it.

    Args:
        transformer: the masked model with its diffusion head.
        vae: the image tokenizer; `scaling_factor` in its config makes latents tokens.
        text_encoder, tokenizer: for text-conditional models, see `varaccel.tokenizers.text`.
        draft_transformer: a smaller MAR of the same tokens and conditions, for `CSpD`.
        class_names: for class-conditional models, names that can be used instead of labels.
        guidance_scale, guidance_schedule, temperature, num_iterations, head_steps, head_sampler: defaults of a call;
            num_iterations is the number of tokens if None.

    Raises:
        InputError: components that do not fit each other.
    """

    family: ClassVar[str] = "mar"
    job_type: ClassVar[type[Job]] = MaskedJob
    compiled_pass = MASKED_PASS
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "draft_transformer"]  # noqa: RUF012

    transformer: MARTransformer
    vae: AutoencoderKL
    draft_transformer: MARTransformer | None

    def __init__(
        self,
        transformer: MARTransformer,
        vae: AutoencoderKL,
        text_encoder: Any = None,
        tokenizer: Any = None,
        draft_transformer: MARTransformer | None = None,
        class_names: Sequence[str] | None = None,
        guidance_scale: float = 3.0,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        num_iterations: int | None = None,
        head_steps: int = 100,
        head_sampler: str = "ddpm",
    ) -> None:
        super().__init__()
        for network in filter(None, (transformer, draft_transformer)):
            self._check_network(network, "masked")
            patch_size(network, vae)
        self._check_text(transformer.signature(), text_encoder, tokenizer)
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            draft_transformer=draft_transformer,
        )
        self.register_to_config(
            class_names=None if class_names is None else list(class_names),
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            num_iterations=num_iterations,
            head_steps=head_steps,
            head_sampler=head_sampler,
        )
        self._graphs = GraphedLoop()

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        levels = len(self.vae.config.block_out_channels)
        return self.transformer.config.grid_size * patch_size(self.transformer, self.vae) * 2 ** (levels - 1)

    @property
    def drafters(self) -> dict[str, nn.Module]:
        return {} if self.draft_transformer is None else {"draft": self.draft_transformer}

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        vae: AutoencoderKL | str | os.PathLike[str],
        draft_transformer: MARTransformer | str | os.PathLike[str] | None = None,
        size: str | None = None,
        **settings: Any,
    ) -> Self:
        """Build a pipeline from published files.

        Args:
            path: the transformer's checkpoint, `checkpoint-last.pth` of MAR-B, MAR-L or MAR-H.
            vae: the image tokenizer, or its file, `kl16.ckpt`.
            draft_transformer: a smaller transformer or its file.
            size: refuse a file of another size ("base", "large", "huge").
            settings: `class_names`, `guidance_scale`, `temperature` and so on; `dtype`, `device_map`.

        Raises:
            CheckpointError: a file that is missing, damaged, unsafe or of another model.
            InputError: components that do not fit each other, an unknown option.
        """
        transformer = MARTransformer.from_original(path, size=size)
        small = (
            draft_transformer
            if draft_transformer is None or isinstance(draft_transformer, MARTransformer)
            else MARTransformer.from_original(draft_transformer)
        )
        image_tokenizer = vae if isinstance(vae, AutoencoderKL) else load_kl(vae)
        components = {"transformer": transformer, "vae": image_tokenizer, "draft_transformer": small}
        return cls._of_single_files(components, settings)

    @property
    def _step(self) -> Step:
        """One step of the head, compiled if the pipeline is."""
        compiled = None
        if self._compilation is not None:
            compiled = self._compilation.function(self.transformer.device, DENOISING_STEP)
        return denoising_step if compiled is None else compiled

    @property
    def _loop(self) -> Loop | None:
        """What runs the step loop of the head; None for step by step, where weights come and go or there is no GPU."""
        offloaded = hasattr(self.transformer, "_hf_hook")
        return self._graphs if is_gpu(self.transformer.device) and not offloaded else None

    # -- the call --------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        guidance_scale: float | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        num_iterations: int | None = None,
        head_steps: int | None = None,
        head_sampler: Sampler | None = None,
        temperature: float | None = None,
        final_noise: bool = False,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        accelerator: AnyAccelerator | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImageOutput | tuple[Any, Statistics]:
        """Make images.

        Args:
            prompt: one description or several; for class-conditional models a label or class name.
            guidance_scale, guidance_schedule: how strictly to follow the prompt, see `MaskedGuidance`; a scale of 1
                switches guidance off and halves the work. The model's own defaults if None.
            num_images_per_prompt: images of each prompt, at least 1.
            batch_size: images that are decoded at once, at most, which bounds memory; all if None. No image depends on
                it but for rounding.
            num_iterations: in how many passes the tokens are decided, at most one per token.
            head_steps, head_sampler, temperature, final_noise: see `HeadSampling`.
            seed: image i uses seed + i and can be made again alone with it.
            generator: instead of a seed: one generator, or one per image.
            accelerator: how to decode faster: an `Accelerator`, its name, or None for plain decoding.
            output_type: "pil", "np", "pt", "raw" (see `to_output`), or "latent" for scaled latents [B, c, H, W].
            return_dict: False for a plain tuple (images, stats).
            callback_on_step_end: called after every pass as (pipe, pass from 0, tokens decided in it, what is shown),
                see `StepCallback`. Set `pipe._interrupt = True` in it to stop.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        config = self.config

        def chosen(value: Any, name: str) -> Any:
            return config[name] if value is None else value

        iterations = chosen(num_iterations, "num_iterations")
        settings = MARSettings(
            MaskedGuidance(
                chosen(guidance_scale, "guidance_scale"), chosen(guidance_schedule, "guidance_schedule")
            ),
            HeadSampling(
                chosen(head_steps, "head_steps"),
                chosen(temperature, "temperature"),
                chosen(head_sampler, "head_sampler"),
                final_noise,
            ),
            self.transformer.num_tokens if iterations is None else iterations,
        )
        cosine_borders(self.transformer.num_tokens, settings.iterations)
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

    # -- what the base asks for ------------------------------------------------------------------------

    def _caption_length(self) -> int:
        return int(self.transformer.buffer)

    def _new_canvas(self, run: Run[MARSettings, MaskedJob]) -> Canvas:
        network = self.transformer
        return Canvas.empty(run.call.images, network.num_tokens, channels=network.channels, device=run.device)

    def _job(self, run: Run[MARSettings, MaskedJob], on_step: OnStep) -> MaskedJob:
        assert run.condition is not None
        network, settings = self.transformer, run.settings
        noise = TokenNoise.draw(run.call.generators, network.num_tokens, network.channels, run.device)
        return MaskedJob(
            network=network,
            canvas=run.canvas,
            rows=run.canvas.batch * (2 if settings.guidance.enabled else 1),
            on_step=on_step,
            drafters=self.drafters,
            load_network=load_network,
            condition=run.condition,
            guidance=settings.guidance,
            sampling=settings.sampling,
            randomness=noise,
            schedule=CosineGroups(noise.permutation, settings.iterations),
            step=self._step,
            loop=self._loop,
            transforms=self._transforms,
        )

    def _latents(self, run: Run[MARSettings, MaskedJob]) -> Tensor:
        patch = patch_size(self.transformer, self.vae)
        return unpatchify(run.canvas.tokens, patch, self.transformer.config.grid_size * patch)

    def _pixels(self, run: Run[MARSettings, MaskedJob]) -> Tensor:
        latents = self._latents(run).to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample

    def _written(self, run: Run[MARSettings, MaskedJob]) -> Tensor:
        side = self.transformer.config.grid_size
        return run.canvas.written.unflatten(1, (side, side))


def patch_size(network: MARTransformer, vae: AutoencoderKL) -> int:
    """Side p of the patches of latents that are one token.

    Raises:
        InputError: the transformer was made for another image tokenizer.
    """
    channels = vae.config.latent_channels
    patch = math.isqrt(max(0, network.channels // channels))
    if patch < 1 or patch * patch * channels != network.channels:
        raise InputError(
            f"the transformer is made for tokens of {network.channels} numbers but the image tokenizer has "
            f"{channels} per latent; use the tokenizer that the transformer was trained with."
        )
    return patch
