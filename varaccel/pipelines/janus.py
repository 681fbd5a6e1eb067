"""Images from prompts with Janus and Janus-Pro (arXiv 2501.17811), through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from varaccel.hosts.causal.guidance import Guidance
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.models.transformers_host.janus import JanusHost
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.pipelines.generate_call import GenerateArguments, ImageCall
from varaccel.pipelines.transformers_host import TransformersPipeline
from varaccel.tokenizers.transformers_vq import JanusImageTokenizer


class JanusPipeline(TransformersPipeline):
    """`JanusForConditionalGeneration`, such as `deepseek-community/Janus-Pro-7B`; see `TransformersPipeline`."""

    family: ClassVar[str] = "janus"
    model_type: ClassVar[str] = "janus"
    model_class: ClassVar[str] = "JanusForConditionalGeneration"
    processor_class: ClassVar[str] = "JanusProcessor"
    host_class: ClassVar[type[TransformersHost]] = JanusHost

    @classmethod
    def _image_tokenizer(cls, model: Any, processor: Any) -> JanusImageTokenizer:
        return JanusImageTokenizer(model.model.vqmodel)

    def _prompt_ids(self, prompt: str, size: tuple[int, int] | None) -> Sequence[int]:
        inputs = self.processor(text=[self._templated(prompt)], generation_mode="image")
        return list(inputs["input_ids"][0])

    @classmethod
    def generate_options(cls, model: Any, options: dict[str, Any]) -> dict[str, Any] | None:
        if options.get("generation_mode") != "image":
            return None
        chosen = {name: value for name, value in options.items() if name != "generation_mode"}
        if "max_length" not in chosen:
            chosen.setdefault("max_new_tokens", model.model.vqmodel.config.num_patches**2)
        return chosen

    @classmethod
    def read_generate(cls, host: Any, arguments: GenerateArguments) -> ImageCall:
        scale = arguments.config.guidance_scale
        return ImageCall(
            Condition(arguments.input_ids, arguments.mask),
            (Grid(host.layout[0], host.layout[0]),),
            Guidance(cls.sampling_defaults["guidance_scale"] if scale is None else scale),
            arguments.sampling(),
            lambda tokens: tokens,
        )
