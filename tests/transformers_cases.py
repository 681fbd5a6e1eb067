"""The hosts of transformers in tests: a tiny pipeline each, and what the model draws by its own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests import tiny_transformers as tiny
from varaccel.pipelines.janus import JanusPipeline
from varaccel.pipelines.transformers_host import TransformersPipeline


@dataclass(frozen=True)
class HostCase:
    """One host of transformers.

    Attributes:
        pipeline: tiny and random, shared by tests, which must not change it.
        expected: (pipe, prompts, guidance scale) -> greedy token ids [B, N] as the model's own code draws them, in the
            image vocabulary, ends of line included.
        prompts: of different length.
        negative: negative prompt of another length; None if the model has its own unconditional prompt.
        scale: guidance scale of guided calls; None for a model without guidance.
    """

    pipeline: Callable[[], TransformersPipeline]
    expected: Callable[[TransformersPipeline, list[str], float], Tensor]
    prompts: tuple[str, ...] = ("a red sphere", "a blue cube left of a red sphere", "cone")
    negative: str | None = None
    scale: float | None = 5.0


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- Janus -------------------------------------------------------------------------------------------------


@cache
def janus_pipeline(**sizes: Any) -> JanusPipeline:
    small = {**sizes, "layers": 2}
    model, draft = tiny.janus(**sizes), tiny.janus(**small)
    return quiet(JanusPipeline(model, tiny.janus_processor(), draft_model=draft))


def janus_expected(pipe: TransformersPipeline, prompts: list[str], scale: float) -> Tensor:
    model = pipe.model
    inputs = pipe.processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    if scale > 1:
        return model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=scale)
    # its own loop cannot do without guidance; whole passes of its own modules can
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        x = model.get_input_embeddings()(ids[mask.bool()][None])
        tokens: list[Tensor] = []
        for _ in range(model.model.vqmodel.config.num_patches**2):
            features = model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
            tokens.append(model.model.generation_head(features[:, -1:]).argmax(-1))
            x = torch.cat([x, model.prepare_embeddings_for_image_generation(tokens[-1])], 1)
        rows.append(torch.cat(tokens, 1))
    return torch.cat(rows)


CASES: dict[str, HostCase] = {
    "janus": HostCase(lambda: janus_pipeline(), janus_expected),
    "janus, one KV head": HostCase(lambda: janus_pipeline(grid=5, codes=40, kv_heads=1), janus_expected),
    "janus, eager": HostCase(
        lambda: janus_pipeline(grid=3, kv_heads=4, attn_implementation="eager"), janus_expected
    ),
}
