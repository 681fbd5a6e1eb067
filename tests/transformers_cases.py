"""The hosts of transformers in tests: a tiny pipeline each, and what the model draws by its own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from tests import tiny_glm_image
from tests import tiny_transformers as tiny
from tests.tiny_chameleon import chameleon, chameleon_processor
from tests.tiny_emu3 import emu3, emu3_processor
from tests.tiny_imagegpt import imagegpt, imagegpt_processor
from varaccel.pipelines.chameleon import ChameleonPipeline
from varaccel.pipelines.emu3 import Emu3Pipeline
from varaccel.pipelines.glm_image import GlmImagePipeline
from varaccel.pipelines.imagegpt import ImageGPTPipeline
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
        options: of every call.
    """

    pipeline: Callable[[], TransformersPipeline]
    expected: Callable[[TransformersPipeline, list[str], float], Tensor]
    prompts: tuple[str, ...] = ("a red sphere", "a blue cube left of a red sphere", "cone")
    negative: str | None = None
    scale: float | None = 5.0
    options: Mapping[str, Any] = field(default_factory=dict)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


RECENT = Version(transformers.__version__) >= Version("5.24")
"""In 5.1, the oldest version that is supported, Janus's own image loop reads no image token after the first one,
nothing splits a model among processes, and weights on disk are not found by parts that run alone."""


# -- Janus -------------------------------------------------------------------------------------------------


@cache
def janus_pipeline(**sizes: Any) -> JanusPipeline:
    small = {**sizes, "layers": 2}
    model, draft = tiny.janus(**sizes), tiny.janus(**small)
    return quiet(JanusPipeline(model, tiny.janus_processor(), draft_model=draft))


def janus_expected(pipe: TransformersPipeline, prompts: list[str], scale: float) -> Tensor:
    model = pipe.model
    inputs = pipe.processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    if scale > 1 and RECENT:
        return model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=scale)
    # its own loop cannot do without guidance; whole passes of its own modules can
    begin = model.generation_config.generation_kwargs["boi_token_id"]
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        prompt = ids[mask.bool()][None]
        empty = prompt.where((prompt == 1) | (prompt == begin), 0)
        branches = [model.get_input_embeddings()(x) for x in ([prompt, empty] if scale > 1 else [prompt])]
        tokens: list[Tensor] = []
        for _ in range(model.model.vqmodel.config.num_patches**2):
            last = [
                model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1:]
                for x in branches
            ]
            logits = [model.model.generation_head(features) for features in last]
            tokens.append((logits[-1] + scale * (logits[0] - logits[-1])).argmax(-1))
            new = model.prepare_embeddings_for_image_generation(tokens[-1])
            branches = [torch.cat([x, new], 1) for x in branches]
        rows.append(torch.cat(tokens, 1))
    return torch.cat(rows)


# -- Emu3 --------------------------------------------------------------------------------------------------


@cache
def emu3_pipeline(**sizes: Any) -> Emu3Pipeline:
    model, draft = emu3(**sizes), emu3(**{**sizes, "layers": 2})
    return quiet(Emu3Pipeline(model, emu3_processor(), height=16, width=24, draft_model=draft))


def emu3_case(negative: str = "blue", height: int = 16, width: int = 24, **sizes: Any) -> HostCase:
    rows, columns = height // 4, width // 4

    def expected(pipe: TransformersPipeline, prompts: list[str], scale: float) -> Tensor:
        mapping = pipe.model.model.vocabulary_mapping
        # the processor counts 8 pixels per token, as published models do
        size = {"ratio": f"{columns}:{rows}", "image_area": rows * columns * 64}
        texts: Any = {"return_for_image_generation": True, "padding": True, "return_tensors": "pt", **size}
        inputs = pipe.processor(text=prompts, **texts)
        assert list(map(list, inputs.pop("image_sizes"))) == [[rows, columns]] * len(prompts)
        guidance = {}
        if scale > 1:
            other = pipe.processor(text=[negative] * len(prompts), **texts)
            guidance = {
                "guidance_scale": scale,
                "negative_prompt_ids": other.input_ids,
                "negative_prompt_attention_mask": other.attention_mask,
            }
        length = inputs.input_ids.shape[1]

        def allowed(_: int, ids: Tensor) -> list[int]:
            ends = (len(ids) - length) % (columns + 1) == columns
            return [mapping.eol_token_id] if ends else mapping.image_tokens

        drawn = pipe.model.generate(
            **inputs,
            **guidance,
            max_new_tokens=rows * (columns + 1),
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
        )
        numbers = {**mapping.bpe2img, mapping.eol_token_id: len(mapping.bpe2img)}
        return torch.tensor([[numbers[number] for number in row] for row in drawn[:, length:].tolist()])

    return HostCase(
        lambda: emu3_pipeline(**sizes),
        expected,
        negative=negative,
        scale=3.0,
        options={"height": height, "width": width},
    )


# -- GLM-Image ---------------------------------------------------------------------------------------------


@cache
def glm_image_pipeline(height: int = 96, width: int = 128, codes: int = 24, **sizes: Any) -> GlmImagePipeline:
    """Its preview grid has a quarter of the published sides, or every test would draw 256 tokens before the image."""
    model = tiny_glm_image.glm_image(codes, **sizes)
    draft = tiny_glm_image.glm_image(codes, **{**sizes, "layers": 2})
    processor = tiny_glm_image.processor(codes, preview=4)
    return quiet(GlmImagePipeline(model, processor, height=height, width=width, draft_model=draft))


def glm_image_expected(pipe: TransformersPipeline, prompts: list[str], scale: float) -> Tensor:
    sizes = {"target_h": pipe.config.height, "target_w": pipe.config.width}
    messages = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
    texts = pipe.processor.apply_chat_template(messages, tokenize=False)
    inputs = pipe.processor(text=texts, padding=True, return_tensors="pt", **sizes)
    grids = inputs["image_grid_thw"][:2]
    codes = pipe.model.config.vq_config.num_embeddings
    drawn = pipe.model.generate(
        **inputs,
        max_new_tokens=int(grids.prod(-1).sum()),
        do_sample=False,
        suppress_tokens=list(range(codes, pipe.model.lm_head.out_features)),
    )
    return drawn[:, inputs["input_ids"].shape[1] :]


# -- Chameleon ---------------------------------------------------------------------------------------------


@cache
def chameleon_pipeline(**sizes: Any) -> ChameleonPipeline:
    model, draft = chameleon(**sizes), chameleon(**{**sizes, "layers": 2})
    return quiet(ChameleonPipeline(model, chameleon_processor(), draft_model=draft))


def chameleon_case(negative: str = "", **sizes: Any) -> HostCase:
    def expected(pipe: TransformersPipeline, prompts: list[str], scale: float) -> Tensor:
        # its own forward pass forbids image tokens, so whole passes of its decoder and head
        model, mapping = pipe.model, pipe.model.model.vocabulary_mapping
        begin = torch.tensor([pipe.processor.image_start_token_id])
        tokens = torch.tensor([mapping.img2bpe[code] for code in range(len(mapping.img2bpe))])

        def ids(text: str) -> Tensor:
            found = pipe.processor(text=[text]).input_ids[0] if text else [1]
            return torch.cat([torch.as_tensor(found), begin])[None]

        rows = []
        for prompt in prompts:
            branches = [ids(prompt), *([ids(negative)] if scale > 1 else [])]
            for _ in range(pipe.transformer.layout[0] ** 2):
                last = [model.model(input_ids=branch).last_hidden_state[:, -1] for branch in branches]
                logits = [model.lm_head(features)[:, tokens] for features in last]
                guided = logits[-1] + scale * (logits[0] - logits[-1]) if scale > 1 else logits[0]
                new = tokens[guided.argmax(-1)][None]
                branches = [torch.cat([branch, new], 1) for branch in branches]
            drawn = branches[0][0, -(pipe.transformer.layout[0] ** 2) :]
            rows.append([mapping.bpe2img[number] for number in drawn.tolist()])
        return torch.tensor(rows)

    return HostCase(lambda: chameleon_pipeline(**sizes), expected, negative=negative, scale=3.0)


# -- ImageGPT ----------------------------------------------------------------------------------------------


@cache
def imagegpt_pipeline(**sizes: Any) -> ImageGPTPipeline:
    model, draft = imagegpt(**sizes), imagegpt(**{**sizes, "layers": 2})
    return quiet(ImageGPTPipeline(model, imagegpt_processor(), draft_model=draft))


def imagegpt_expected(pipe: TransformersPipeline, prompts: list[str], scale: float) -> Tensor:
    begin = torch.full((len(prompts), 1), pipe.model.config.vocab_size - 1)
    return pipe.model.generate(begin, max_new_tokens=pipe.model.config.n_positions, do_sample=False)[:, 1:]


def imagegpt_case(**sizes: Any) -> HostCase:
    return HostCase(lambda: imagegpt_pipeline(**sizes), imagegpt_expected, prompts=("", "", ""), scale=None)


CASES: dict[str, HostCase] = {
    "janus": HostCase(lambda: janus_pipeline(), janus_expected),
    "janus, one KV head": HostCase(lambda: janus_pipeline(grid=5, codes=40, kv_heads=1), janus_expected),
    "janus, eager": HostCase(
        lambda: janus_pipeline(grid=3, kv_heads=4, attn_implementation="eager"), janus_expected
    ),
    "imagegpt": imagegpt_case(),
    "imagegpt, scaled by layer": imagegpt_case(
        side=5, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True
    ),
    "chameleon": chameleon_case(),
    "chameleon, tokens in any order": chameleon_case("a blue cube left of a cone", grid=3, scattered=True),
    "chameleon, Swin norms": chameleon_case(grid=3, kv_heads=4, swin_norm=True),
    "emu3": emu3_case("a blue cube left of a red sphere and a green cone"),
    "emu3, one KV head": emu3_case(height=20, width=12, kv_heads=1),
    "emu3, tokens in any order": emu3_case(height=12, width=8, scattered=True),
    "glm-image": HostCase(lambda: glm_image_pipeline(), glm_image_expected, scale=None),
    "glm-image, one KV head": HostCase(
        lambda: glm_image_pipeline(height=160, width=64, codes=40, kv_heads=1), glm_image_expected, scale=None
    ),
    "glm-image, eager": HostCase(
        lambda: glm_image_pipeline(height=96, width=96, kv_heads=4, attn_implementation="eager"),
        glm_image_expected,
        scale=None,
    ),
}
