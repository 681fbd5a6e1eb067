"""Images pixel by pixel with ImageGPT (Chen et al. 2020), through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from varaccel.errors import InputError
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.models.transformers_host.imagegpt import ImageGPTHost
from varaccel.nn.condition import Condition
from varaccel.pipelines.base import Call
from varaccel.pipelines.causal import CausalSettings
from varaccel.pipelines.transformers_host import TransformersPipeline
from varaccel.tokenizers.color_clusters import ColorClusters


class ImageGPTPipeline(TransformersPipeline):
    """`ImageGPTForCausalImageModeling`, such as `openai/imagegpt-small`; see `TransformersPipeline`.

    It reads no prompt: `pipe("", num_images_per_prompt=4)`, or None. The processor is the model's image processor,
    which knows the colours.
    """

    family: ClassVar[str] = "imagegpt"
    model_type: ClassVar[str] = "imagegpt"
    model_class: ClassVar[str] = "ImageGPTForCausalImageModeling"
    processor_class: ClassVar[str] = "ImageGPTImageProcessor"
    host_class: ClassVar[type[TransformersHost]] = ImageGPTHost
    split_rules: ClassVar[None] = None
    sampling_defaults: ClassVar[dict[str, float]] = {
        "guidance_scale": 1.0,
        "temperature": 1.0,
        "top_k": 40,
        "top_p": 1.0,
    }

    @classmethod
    def _image_tokenizer(cls, model: Any, processor: Any) -> ColorClusters:
        return ColorClusters(getattr(processor, "clusters", None))

    def _prompts(self, prompt: Any) -> list[str | int]:
        return super()._prompts("" if prompt is None else prompt)

    def _pad_token(self) -> int:
        return 0  # all prompts are equally long

    def _prompt_ids(self, prompt: str, size: tuple[int, int] | None) -> Sequence[int]:
        if prompt:
            raise InputError(
                f"ImageGPT reads no prompt, got {prompt!r}; pass '', and say how many by num_images_per_prompt."
            )
        return [self.transformer.begin_of_image]

    def _call_condition(self, call: Call, settings: CausalSettings) -> Condition | None:
        if settings.guidance.enabled or settings.negative_prompts is not None:
            raise InputError(
                "ImageGPT reads no prompt, so there is nothing to guide to; leave guidance_scale and negative_prompt "
                "out."
            )
        return super()._call_condition(call, settings)

    def _without_prompt(self, settings: CausalSettings) -> Condition:
        return self._condition_of([""], settings)
