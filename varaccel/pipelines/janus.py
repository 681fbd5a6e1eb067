"""Images from prompts with Janus and Janus-Pro (arXiv 2501.17811), through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from varaccel.models.transformers_host.host import TransformersHost
from varaccel.models.transformers_host.janus import JanusHost
from varaccel.pipelines.transformers_host import TransformersPipeline
from varaccel.tokenizers.transformers_vq import JanusImageTokenizer


class JanusPipeline(TransformersPipeline):
    """`JanusForConditionalGeneration`, such as `deepseek-community/Janus-Pro-7B`; see `TransformersPipeline`."""

    family: ClassVar[str] = "janus"
    model_type: ClassVar[str] = "janus"
    model_class: ClassVar[str] = "JanusForConditionalGeneration"
    host_class: ClassVar[type[TransformersHost]] = JanusHost

    @classmethod
    def _image_tokenizer(cls, model: Any) -> JanusImageTokenizer:
        return JanusImageTokenizer(model.model.vqmodel)

    def _prompt_ids(self, prompt: str) -> Sequence[int]:
        inputs = self.processor(text=[self._templated(prompt)], generation_mode="image")
        return list(inputs["input_ids"][0])
