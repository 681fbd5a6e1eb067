"""Images of any size from prompts with Emu3 (arXiv 2409.18869), through transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from varaccel.errors import InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.job import CausalJob
from varaccel.models.transformers_host.emu3 import Emu3Host
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.signature import Signature
from varaccel.pipelines.base import Run
from varaccel.pipelines.causal import CausalSettings
from varaccel.pipelines.generate_call import GenerateArguments, ImageCall
from varaccel.pipelines.image_sizes import whole_tokens
from varaccel.pipelines.sized_host import SizedTransformersPipeline
from varaccel.pipelines.tensor_parallel import LLAMA_RULES
from varaccel.tokenizers.emu3_vq import Emu3ImageTokenizer

logger = logging.getLogger(__name__)


class Emu3Pipeline(SizedTransformersPipeline):
    """`Emu3ForConditionalGeneration`, such as `BAAI/Emu3-Gen-hf`; see `TransformersPipeline`.

    The prompt says the size of the image, and every row of tokens ends with an end of line, which is given.

    Args:
        height, width: of the images in pixels, unless a call says otherwise.
        model, processor, guidance_scale, top_k, temperature, top_p, eagle_head, draft_model: see
            `TransformersPipeline`.
    """

    family: ClassVar[str] = "emu3"
    model_type: ClassVar[str] = "emu3"
    model_class: ClassVar[str] = "Emu3ForConditionalGeneration"
    processor_class: ClassVar[str] = "Emu3Processor"
    host_class: ClassVar[type[TransformersHost]] = Emu3Host
    split_rules: ClassVar[Mapping[str, str]] = {
        f"model.text_model.layers.*.{part}": rule for part, rule in LLAMA_RULES.items()
    }
    sampling_defaults: ClassVar[dict[str, float]] = {
        "guidance_scale": 3.0,
        "temperature": 1.0,
        "top_k": 2048,
        "top_p": 1.0,
    }
    default_negative_prompt: ClassVar[str | None] = (
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
        "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    """Of the model card."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        height: int = 720,
        width: int = 720,
        eagle_head: Any = None,
        draft_model: Any = None,
    ) -> None:
        super().__init__(
            model,
            processor,
            guidance_scale,
            top_k,
            temperature,
            top_p,
            eagle_head=eagle_head,
            draft_model=draft_model,
        )
        whole_tokens(height, width, self.vq_model.downsample_factor)
        self.register_to_config(height=height, width=width)

    @classmethod
    def _image_tokenizer(cls, model: Any, processor: Any) -> Emu3ImageTokenizer:
        images = getattr(processor, "image_processor", None)
        if images is None or not images.do_normalize:
            return Emu3ImageTokenizer(model.model.vqmodel)
        return Emu3ImageTokenizer(model.model.vqmodel, images.image_mean, images.image_std)

    @staticmethod
    def _check_vocabulary(signature: Signature, vq_model: Any) -> None:
        assert signature.vocab_size is not None
        codes = signature.vocab_size - 1  # the end of line is no token of an image
        if codes != vq_model.codebook_size:
            raise InputError(
                f"the model predicts {codes} image tokens but its image tokenizer has {vq_model.codebook_size}; "
                "load both from one repository."
            )

    # -- sizes and prompts -----------------------------------------------------------------------------

    def _check_size(self, size: tuple[int, int]) -> None:
        rows, columns = self._tokens(size)
        tokens, trained = rows * (columns + 1), self.transformer.decoder.config.max_position_embeddings
        if tokens > trained:
            logger.warning(
                "an image of %d × %d pixels has %d tokens, the model was made for %d; it may fall apart.",
                *size,
                tokens,
                trained,
            )

    def _tokens(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of tokens of an image of (height, width) pixels."""
        height, width = size or (self.config.height, self.config.width)
        step = self.vq_model.downsample_factor
        return height // step, width // step

    def _prompt_ids(self, prompt: str, size: tuple[int, int] | None) -> Sequence[int]:
        rows, columns = self._tokens(size)
        step = self.processor.downsample_ratio
        # the processor derives rows and columns from a ratio and an area
        inputs = self.processor(
            text=[prompt],
            return_for_image_generation=True,
            ratio=f"{columns}:{rows}",
            image_area=rows * columns * step * step,
        )
        return list(inputs["input_ids"][0])

    def _grids(self, run: Run[CausalSettings, CausalJob]) -> tuple[Grid, ...]:
        return (Grid(*self._tokens(run.settings.size), end_of_line=self.transformer.end_of_line),)

    # -- inside generate() -----------------------------------------------------------------------------

    @classmethod
    def generate_options(cls, model: Any, options: dict[str, Any]) -> dict[str, Any] | None:
        return options if options.get("image_sizes") is not None else None

    @classmethod
    def read_generate(cls, host: Any, arguments: GenerateArguments) -> ImageCall:
        """What a `model.generate` call says; `image_sizes` of the processor tells rows and columns of tokens."""
        prompts, listed = arguments.input_ids, arguments.inputs.get("image_sizes")
        if listed is None:
            raise InputError(
                "accelerated generate() of Emu3 needs the image_sizes that the processor makes with "
                "return_for_image_generation=True; pass them on."
            )
        rows, *others = torch.as_tensor(listed).view(-1, 2).tolist()
        arguments.check_one_size(rows == other for other in others)
        grid = Grid(rows[0], rows[1], end_of_line=host.end_of_line)
        most = arguments.most_tokens(grid.num_positions)
        scale, negative = arguments.negative()
        if scale != 1 and negative is None:  # as transformers does without a negative prompt
            negative = Condition(prompts[:, -1:])
        if negative is not None:
            negative = negative.repeat_interleave(len(prompts) // negative.batch)
        ends = closing_tokens(host.model)

        def finish(drawn: Tensor) -> Tensor:
            closing = drawn.new_tensor(ends).expand(len(drawn), -1)
            whole = torch.cat([prompts, host.text_ids(drawn), closing], 1)
            return whole if most is None else whole[:, : prompts.shape[1] + most]

        return ImageCall(
            Condition(prompts, arguments.mask, negative),
            (grid,),
            Guidance(scale),
            arguments.sampling(),
            finish,
        )

    # -- neighbours of tokens --------------------------------------------------------------------------

    def _has_neighbours(self) -> bool:
        return True

    def _neighbours(self, k: int, normalise: bool) -> Tensor:
        table = super()._neighbours(k, normalise)
        # whatever an end of line lists is impossible where it stands
        return torch.cat([table, table[:1]])


def closing_tokens(model: Any) -> list[int]:
    """What follows the last row of an image: end of file, end of image, end of text."""
    vocabulary, end = model.config.vocabulary_map, model.config.text_config.eos_token_id
    return [
        vocabulary["<|extra_201|>"],
        vocabulary["<|image end|>"],
        end[0] if isinstance(end, (list, tuple)) else end,
    ]
