"""Images from prompts or classes with any model that decides one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varaccel.accelerators import AnyAccelerator
from varaccel.engine.canvas import Canvas
from varaccel.engine.job import Job
from varaccel.engine.loop import OnStep
from varaccel.engine.network import check_substitute
from varaccel.engine.options import positive_integer
from varaccel.engine.randomness import Randomness
from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.sampling import Sampling
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid, line_ends
from varaccel.nn.signature import Signature
from varaccel.pipelines.base import NO_PROMPT, Call, Run
from varaccel.pipelines.compiled_passes import CAUSAL_PASS
from varaccel.pipelines.inpainting import Source, kept_cells
from varaccel.pipelines.output import ImageOutput
from varaccel.pipelines.painting import PaintingPipeline
from varaccel.pipelines.published import load_network
from varaccel.pipelines.step_callback import StepCallback
from varaccel.speculation.network_drafter import LayerSubset
from varaccel.tokenizers.neighbours import neighbour_table


@dataclass(frozen=True)
class CausalSettings:
    """What a call says about the distributions of tokens.

    Attributes:
        negative_prompts: what the unconditional branch of guidance reads instead of nothing: one for all prompts, or
            one for each; None for nothing.
        size: height and width of the images in pixels; None for the model's own.
        source: an image that is edited; None for images from nothing.
    """

    guidance: Guidance
    sampling: Sampling
    negative_prompts: tuple[str | int, ...] | None = None
    size: tuple[int, int] | None = None
    source: Source | None = None


class CausalPipeline(PaintingPipeline[CausalSettings, CausalJob], abstract=True):
    """Text- or class-conditional generation with a causal network and any accelerator for it.

    A family of its own is a subclass with a `family` and, where they differ, `_condition`, `_without_prompt`, `_grids`,
    `_encode` and `_check_vocabulary`.

    Args:
        transformer: the autoregressive model, a `CausalNetwork`.
        vq_model: the image tokenizer whose token ids it predicts: `decode_tokens` and `downsample_factor`,
            `encode_tokens` to paint into images, and `codebook` [V, C] if its tokens are vectors.
        text_encoder, tokenizer: for text-conditional models, see `varaccel.tokenizers.text`.
        class_names: for class-conditional models, names that can be used instead of labels.
        guidance_scale, top_k, temperature, top_p: defaults of a call.
        eagle_head, draft_transformer: drafters for speculative accelerators, trained for this transformer; see
            `varaccel train drafter`. A draft transformer is any network of the transformer's signature.

    Raises:
        InputError: components that do not fit each other.
    """

    job_type: ClassVar[type[Job]] = CausalJob
    compiled_pass = CAUSAL_PASS
    model_cpu_offload_seq = "text_encoder->transformer->vq_model"
    _optional_components = ["text_encoder", "tokenizer", "eagle_head", "draft_transformer"]  # noqa: RUF012

    default_negative_prompt: ClassVar[str | None] = None
    """What guidance leads away from if a call does not say; None for the network's own null condition."""

    vq_model: Any
    eagle_head: Any
    draft_transformer: Any

    def __init__(
        self,
        transformer: Any,
        vq_model: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        class_names: Sequence[str] | None = None,
        guidance_scale: float | Sequence[float] = 4.0,
        top_k: int = 0,
        temperature: float = 1.0,
        eagle_head: Any = None,
        draft_transformer: Any = None,
        top_p: float = 1.0,
    ) -> None:
        super().__init__()
        signature = self._check_network(transformer, "causal")
        self._check_vocabulary(signature, vq_model)
        self._check_text(signature, text_encoder, tokenizer)
        check_eagle_head(eagle_head, transformer, "draft_transformer")
        if draft_transformer is not None:
            check_substitute(draft_transformer, transformer, "drafter")
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
            top_p=top_p,
        )
        self._begin()

    def _begin(self) -> None:
        """What a pipeline keeps from call to call; for constructors of one's own."""
        self._tables: dict[bool, Tensor] = {}

    @staticmethod
    def _check_vocabulary(signature: Signature, vq_model: Any) -> None:
        """Refuse an image tokenizer of another vocabulary; overridden where the network has further token ids.

        Raises:
            InputError: numbers of token ids that differ.
        """
        if signature.vocab_size != vq_model.codebook_size:
            raise InputError(
                f"the transformer predicts {signature.vocab_size} token ids but the image tokenizer has "
                f"{vq_model.codebook_size}; use the tokenizer that the transformer was trained with."
            )

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels.

        Raises:
            InputError: images that are not square.
        """
        layout = self.transformer.signature().layout
        if layout is None or layout[0] != layout[-1]:
            raise InputError(f"the images of this model have no single size: its layout is {layout}.")
        return int(layout[0] * self.vq_model.downsample_factor)

    @property
    def drafters(self) -> dict[str, nn.Module]:
        found = {"eagle": self.eagle_head, "small": self.draft_transformer}
        return {name: drafter for name, drafter in found.items() if drafter is not None}

    def _has_neighbours(self) -> bool:
        """Whether every token id has a vector: an image tokenizer of the user's own may have none."""
        codebook = getattr(self.vq_model, "codebook", None)
        return codebook is not None and len(codebook) == self.transformer.signature().vocab_size

    def _neighbours(self, k: int, normalise: bool) -> Tensor:
        """Nearest neighbours in the codebook, int32 [V, k + 1]; kept for the next call."""
        table = self._tables.get(normalise)
        if table is None or table.shape[1] < min(k + 1, self.vq_model.codebook_size - 1):
            vectors = self.vq_model.codebook.detach().float()
            table = neighbour_table(vectors, k, normalise=normalise)
            self._tables[normalise] = table
        return table

    def _transforms(self, network: Any) -> Callable[..., Tensor] | None:
        if not isinstance(network, LayerSubset):
            return super()._transforms(network)
        whole = super()._transforms(network.network)
        return None if whole is None else partial(whole, layers=network.layers)

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
        """Make images.

        Args:
            prompt: one description or several; for class-conditional models a label or class name.
            negative_prompt: what the images shall not look like, one for all prompts or one for each: guidance leads
                away from it. If None, away from the model's default negative prompt, or else from no prompt at all.
                Of more than two branches it is the last.
            height, width: of the images in pixels, for models that draw several sizes; the model's own if None.
            ratio: instead of them: width to height, such as "16:9", at about as many pixels as the model's own size.
            guidance_scale: how strictly to follow the prompt; 1 switches guidance off and halves the work.
                The model's own default if None. Several numbers where the condition has more than two branches, see
                `Guidance`.
            guidance_interval: see `Guidance`.
            num_images_per_prompt: images of each prompt, at least 1.
            batch_size: images that are decoded at once, at most, which bounds memory; all if None. With accelerators
                whose images advance at their own pace the place of a finished one is taken by the next at once. No
                image depends on it but for rounding.
            seed: image i uses seed + i and can be made again alone with it.
            generator: instead of a seed: one generator, or one per image.
            temperature, top_k, top_p: see `Sampling`; the model's own defaults if None.
            accelerator: how to decode faster: an `Accelerator`, its name, or None for plain decoding.
            output_type: "pil", "np", "pt", "raw" (see `to_output`), or "latent" for the token ids.
            return_dict: False for a plain tuple (images, stats).
            callback_on_step_end: called after every pass as (pipe, step from 0, tokens decided per image in
                this pass, what is shown), see `StepCallback`. Set `pipe._interrupt = True` in it to stop; empty
                places then hold token id 0.

        Raises:
            InputError: any argument that cannot be used.
            OutOfMemory: the device is too small for the call.
        """
        settings = CausalSettings(
            self._guidance(guidance_scale, guidance_interval),
            self._sampling(temperature, top_k, top_p),
            negative_prompts=self._negative_prompts(negative_prompt),
            size=self._call_size(height, width, ratio),
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
        negative_prompt: str | int | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_interval: int = -1,
        num_images: int = 1,
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
        """Paint a part of an image anew, without training for it.

        Tokens in whose cell nothing is painted are those of the image. They went through the image tokenizer, so that
        they come back close to what they were, not equal. A token is drawn knowing what is above it and to its left
        only: what stays below and to the right has no say, so a seam may show there.

        Args:
            image: a PIL image, array or tensor of any size and kind, see `rgb_image`; a centred part of it of the
                model's aspect is kept, scaled to the model's size.
            mask: white where to paint, see `marked_pixels`; of the whole image, of its size or scaled evenly.
            prompt: what to paint, or what the whole image should show: a description, or a class; None for whatever
                fits.
            num_images: versions to make; version i uses seed + i.
            negative_prompt, height, width, ratio, guidance_scale, guidance_interval, seed, generator, temperature,
                top_k, top_p, accelerator, output_type, return_dict, callback_on_step_end: as in a call. Without a
                prompt there is nothing to guide to.

        Raises:
            InputError: any argument that cannot be used, an image tokenizer that cannot encode, or no prompt for a
                model that needs one.
            OutOfMemory: the device is too small for the call.
        """
        num_images = positive_integer("num_images", num_images)
        settings = CausalSettings(
            self._guidance(1.0 if prompt is None else guidance_scale, guidance_interval),
            self._sampling(temperature, top_k, top_p),
            negative_prompts=self._negative_prompts(negative_prompt),
            size=self._call_size(height, width, ratio),
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

    def _guidance(self, scale: float | Sequence[float] | None, interval: int) -> Guidance:
        return Guidance(self.config.guidance_scale if scale is None else scale, interval)

    def _sampling(self, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
        return Sampling(
            self.config.temperature if temperature is None else temperature,
            self.config.top_k if top_k is None else top_k,
            self.config.top_p if top_p is None else top_p,
        )

    def _negative_prompts(
        self, given: str | int | Sequence[str | int] | None
    ) -> tuple[str | int, ...] | None:
        return None if given is None else tuple(self._prompts(given))

    # -- what the base asks for ------------------------------------------------------------------------

    def _size(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        """The size of the images of a call as (height, width); None for that of the model.

        Raises:
            InputError: a size that the model cannot draw.
        """
        if height is None and width is None:
            return None
        own = self.image_size
        if {height, width} - {None, own}:
            raise InputError(f"this model draws images of {own} × {own} pixels; leave height and width out.")
        return None

    def _call_size(self, height: int | None, width: int | None, ratio: str | None) -> tuple[int, int] | None:
        if ratio is None:
            return self._size(height, width)
        if height is not None or width is not None:
            raise InputError("ratio takes the place of height and width; give one or the other.")
        return self._ratio_size(ratio)

    def _ratio_size(self, ratio: str) -> tuple[int, int]:
        """The size of images (height, width) in pixels of a ratio of width to height.

        Raises:
            InputError: no ratio, or one that the model cannot draw.
        """
        raise InputError("this model draws images of one size; leave ratio out.")

    def _condition_of(self, prompts: list[str | int], settings: CausalSettings) -> Condition | None:
        """The condition of each prompt; overridden where prompts say more than the text, such as the size."""
        return self._condition(prompts)

    def _call_condition(self, call: Call, settings: CausalSettings) -> Condition | None:
        if call.prompts[0] is NO_PROMPT:
            return self._without_prompt(settings)
        condition = self._condition_of(call.prompts, settings)
        negative = settings.negative_prompts
        if negative is not None and len(negative) not in (1, len(call.prompts)):
            raise InputError(
                f"there are {len(negative)} negative prompts for {len(call.prompts)} prompts; give one for all, or one "
                "for each."
            )
        if negative is None and self.default_negative_prompt is not None:
            negative = (self.default_negative_prompt,)
        if negative is None or condition is None or not settings.guidance.enabled:
            return condition
        other = self._condition_of([*negative] * (len(call.prompts) // len(negative)), settings)
        assert other is not None
        return replace(condition, negative=(*condition.negatives[:-1], replace(other, negative=None)))

    def _caption_length(self) -> int:
        slots = self.transformer.signature().condition_slots
        return super()._caption_length() if slots is None else int(slots)

    def _without_prompt(self, settings: CausalSettings) -> Condition:
        """What the unconditional branch of guidance reads: the network's own word for "none".

        Raises:
            InputError: a network that has none for this kind of condition; overridden for those with negative prompts.
        """
        signature, network = self.transformer.signature(), self.transformer
        if signature.condition == "class":
            values = torch.zeros(1, dtype=torch.int64, device=self._execution_device)
        elif signature.condition == "caption" and signature.condition_size is not None:
            shape = (1, self._caption_length(), signature.condition_size)
            values = torch.zeros(shape, dtype=network.dtype, device=self._execution_device)
        else:
            raise InputError("this model draws nothing without a prompt; say what to paint.")
        return Condition(network.unconditional(values))

    def _grids(self, run: Run[CausalSettings, CausalJob]) -> tuple[Grid, ...]:
        """The grids of an image, one after the other."""
        layout = self.transformer.signature().layout
        if layout is None or len(layout) > 2:
            raise InputError(
                f"the signature's layout {layout} does not tell the grid of an image; implement `_grids` in "
                f"{type(self).__name__}."
            )
        return (Grid(layout[0], layout[-1]),)

    def _new_canvas(self, run: Run[CausalSettings, CausalJob]) -> Canvas:
        source, grids = run.settings.source, self._grids(run)
        given = None if source is None else self._given_tokens(source, grids[-1])
        return new_canvas(grids, run.call.images, run.device, given)

    def _given_tokens(self, source: Source, grid: Grid) -> Tensor:
        """[h, w] token ids of what stays of an image, -1 where it is painted anew."""
        pixels_per_token = self.vq_model.downsample_factor
        pixels, painted = source.fitted((grid.height * pixels_per_token, grid.width * pixels_per_token))
        device = self._execution_device
        token_ids = self._encode(pixels.to(device))[0]
        kept = kept_cells(painted, grid.height, grid.width)
        return torch.where(kept.to(device), token_ids, -1)

    def _job(self, run: Run[CausalSettings, CausalJob], on_step: OnStep) -> CausalJob:
        assert run.condition is not None
        guidance = run.settings.guidance
        return CausalJob(
            network=self.transformer,
            canvas=run.canvas,
            rows=run.canvas.batch * guidance.branches,
            on_step=on_step,
            drafters=self.drafters,
            load_network=load_network,
            condition=run.condition,
            grids=self._grids(run),
            guidance=guidance,
            sampling=run.settings.sampling,
            randomness=Randomness.draw(run.call.generators, run.canvas.num_positions, run.device),
            neighbours=self._neighbours if self._has_neighbours() else None,
            transforms=self._transforms,
        )

    def _latents(self, run: Run[CausalSettings, CausalJob]) -> Tensor:
        return self._as_grid(run, run.canvas.tokens)

    def _pixels(self, run: Run[CausalSettings, CausalJob]) -> Tensor:
        return self.vq_model.decode_tokens(self._as_grid(run, run.canvas.tokens))

    def _written(self, run: Run[CausalSettings, CausalJob]) -> Tensor:
        return self._as_grid(run, run.canvas.written)

    def _as_grid(self, run: Run[CausalSettings, CausalJob], values: Tensor) -> Tensor:
        """The last grid of the image without ends of line, [B, N] -> [B, h, w]."""
        grid = self._grids(run)[-1]
        return values[:, -grid.num_positions :].unflatten(1, (grid.height, grid.pitch))[..., : grid.width]


def check_eagle_head(eagle_head: Any, transformer: Any, other: str) -> None:
    """Refuse a head that was not trained for a transformer, or is none.

    Args:
        eagle_head: None for none.
        other: the argument for drafters of other kinds.

    Raises:
        InputError: see above.
    """
    if eagle_head is None:
        return
    if not hasattr(eagle_head, "check_fits"):
        raise InputError(
            f"eagle_head must be an EagleHead, got {type(eagle_head).__name__}; a network of the model's "
            f"signature is a {other}."
        )
    eagle_head.check_fits(transformer)


def new_canvas(
    grids: tuple[Grid, ...], images: int, device: torch.device, given: Tensor | None = None
) -> Canvas:
    """An empty canvas but for what is given: ends of line, so that rows side by side can read them ahead, and tokens.

    Args:
        given: [h, w] token ids that stand in the last grid of every image, -1 where none is given.
    """
    if given is None and all(grid.end_of_line is None for grid in grids):
        return Canvas.empty(images, sum(grid.num_positions for grid in grids), device=device)
    tokens = line_ends(grids, torch.device(device)).clone()  # [N], -1 where nothing is given
    if given is not None:
        last = grids[-1]
        tokens[-last.num_positions :].view(last.height, last.pitch)[:, : last.width] = given
    fixed = tokens.expand(images, -1)
    return Canvas.given(fixed.clamp(min=0), fixed >= 0)
