"""Images from prompts with Chameleon (arXiv 2405.09818) and Anole (arXiv 2407.06135), through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from varaccel.errors import InputError
from varaccel.models.transformers_host.chameleon import ChameleonHost
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.nn.checkpoints import weights_below
from varaccel.pipelines.base import Call
from varaccel.pipelines.load_options import LoadOptions
from varaccel.pipelines.transformers_host import TransformersPipeline
from varaccel.tokenizers.chameleon_vq import NO_DECODER, ChameleonImageDecoder, ChameleonImageTokenizer


class ChameleonPipeline(TransformersPipeline):
    """`ChameleonForConditionalGeneration`, such as `leloy/Anole-7b-v0.1-hf`; see `TransformersPipeline`.

    transformers' Chameleon reads images and writes none: its image tokenizer has no decoder. One that lies in the
    checkpoint is found; without one the pipeline draws tokens, for `output_type="latent"`.

    Args:
        image_decoder: a `ChameleonImageDecoder`.
        model, processor, guidance_scale, top_k, temperature, top_p, eagle_head, draft_model: see
            `TransformersPipeline`. Guidance is off unless it is asked for; then it leads away from an empty prompt.
    """

    family: ClassVar[str] = "chameleon"
    model_type: ClassVar[str] = "chameleon"
    model_class: ClassVar[str] = "ChameleonForConditionalGeneration"
    processor_class: ClassVar[str] = "ChameleonProcessor"
    host_class: ClassVar[type[TransformersHost]] = ChameleonHost
    split_rules: ClassVar[None] = None  # norms of every head, whose weights would have to be shared out too
    sampling_defaults: ClassVar[dict[str, float]] = {
        "guidance_scale": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    default_negative_prompt: ClassVar[str | None] = ""
    model_cpu_offload_seq = "model->image_decoder"
    _optional_components = ["eagle_head", "draft_model", "image_decoder"]  # noqa: RUF012

    image_decoder: Any

    def __init__(
        self,
        model: Any,
        processor: Any,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        image_decoder: Any = None,
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
        if image_decoder is not None and not isinstance(image_decoder, ChameleonImageDecoder):
            raise InputError(f"image_decoder is a ChameleonImageDecoder, got {type(image_decoder).__name__}.")
        self.vq_model = ChameleonImageTokenizer(model.model.vqmodel, image_decoder)
        self.register_modules(image_decoder=image_decoder)

    @classmethod
    def _image_tokenizer(cls, model: Any, processor: Any) -> ChameleonImageTokenizer:
        return ChameleonImageTokenizer(model.model.vqmodel)

    @classmethod
    def _further_parts(cls, folder: Path, model: Any, chosen: LoadOptions) -> dict[str, Any]:
        state = weights_below(folder, "model.vqmodel.")
        names = [name for name in state if name.startswith(("decoder.", "post_quant_conv."))]
        if "image_decoder" in chosen.parts or not any(name.startswith("decoder.") for name in names):
            return {}
        decoder: nn.Module = ChameleonImageDecoder.from_state(
            model.model.vqmodel.config, {name: state[name] for name in names}, source=str(folder)
        )
        dtype = chosen.dtype_of("image_decoder") or model.dtype
        return {"image_decoder": decoder.to(cls.host_class(model).device, dtype)}

    def _checked_call(self, prompt: Any, **options: Any) -> Call:
        call = super()._checked_call(prompt, **options)
        if self.image_decoder is None and call.output_type != "latent":
            raise InputError(NO_DECODER)
        return call

    def _prompt_ids(self, prompt: str, size: tuple[int, int] | None) -> Sequence[int]:
        # the processor ends a turn with a separator; where nothing was said there is no turn
        inputs = self.processor(text=[prompt], return_for_text_completion=not prompt)
        return [*list(inputs["input_ids"][0]), int(self.processor.image_start_token_id)]
