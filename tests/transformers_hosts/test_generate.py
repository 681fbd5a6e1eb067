"""Accelerators inside `model.generate` of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import varaccel
from tests import tiny_transformers as tiny
from tests.tiny_emu3 import emu3, emu3_processor
from tests.transformers_cases import janus_expected, janus_pipeline
from varaccel.errors import InputError
from varaccel.pipelines.emu3 import closing_tokens

PROMPTS = ["a red sphere", "a blue cube left of a red sphere"]


def janus_inputs(**options: Any) -> dict[str, Any]:
    inputs = tiny.janus_processor()(text=PROMPTS, generation_mode="image", padding=True, return_tensors="pt")
    return {**inputs, "generation_mode": "image", "guidance_scale": 5.0, **options}


@pytest.mark.parametrize("accelerator", ["plain", "jacobi", "speculative", "auto"])
def test_greedy_images_are_those_of_the_models_own_generate(accelerator: str) -> None:
    model, inputs = tiny.janus(), janus_inputs(do_sample=False)
    own = model.generate(**inputs)
    accelerated = varaccel.accelerate(model, accelerator)
    assert accelerated is model
    assert torch.equal(model.generate(**inputs), janus_expected(janus_pipeline(), PROMPTS, 5.0))
    varaccel.accelerate(model, None)
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**inputs), own)


def test_sampled_images_follow_the_default_generator() -> None:
    model = varaccel.accelerate(tiny.janus(), "jacobi")

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(**janus_inputs(do_sample=True, temperature=2.0, num_return_sequences=2))

    with torch.random.fork_rng():
        first, again, other = drawn(0), drawn(0), drawn(1)
    assert first.shape == (4, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_text_is_generated_as_before() -> None:
    model = tiny.janus()
    ids = torch.tensor([[1, 7, 8]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    varaccel.accelerate(model, "jacobi")
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_a_smaller_model_drafts() -> None:
    model, inputs = tiny.janus(), janus_inputs(do_sample=False)
    expected = janus_expected(janus_pipeline(), PROMPTS, 5.0)
    varaccel.accelerate(model, varaccel.Speculative("small", 3), draft_model=tiny.janus(layers=2))
    assert torch.equal(model.generate(**inputs), expected)


def test_weights_stay_as_they_are() -> None:
    model = tiny.janus()
    before = copy.deepcopy(model.state_dict())
    varaccel.accelerate(model, "jacobi").generate(**janus_inputs(do_sample=False))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def emu3_call(**options: Any) -> tuple[Any, dict[str, Any], Any]:
    """A tiny Emu3, the inputs of a guided call of its `generate` for 3 × 4 tokens, and the rows that it may draw."""
    model, processor = emu3(), emu3_processor()
    texts: Any = {"return_for_image_generation": True, "ratio": "4:3", "image_area": 3 * 4 * 64}
    texts |= {"padding": True, "return_tensors": "pt"}
    inputs = processor(text=PROMPTS, **texts)
    negative = processor(text=["blue"] * 2, **texts)
    length, mapping = inputs.input_ids.shape[1], model.model.vocabulary_mapping
    ends = closing_tokens(model)

    def rows(_: int, ids: Tensor) -> list[int]:
        place = len(ids) - length
        if place >= 15:
            return ends[place - 15 : place - 14]
        return [mapping.eol_token_id] if place % 5 == 4 else mapping.image_tokens

    guidance = {
        "guidance_scale": 3.0,
        "negative_prompt_ids": negative.input_ids,
        "negative_prompt_attention_mask": negative.attention_mask,
    }
    call = {**inputs, **guidance, "max_new_tokens": 18, "do_sample": False, **options}
    return model, call, rows


@pytest.mark.parametrize("accelerator", ["plain", "jacobi", "speculative", varaccel.ZipAR(4)])
def test_emu3_draws_with_a_custom_generate(accelerator: Any) -> None:
    model, call, rows = emu3_call()
    sizes = call.pop("image_sizes")
    expected = model.generate(**call, prefix_allowed_tokens_fn=rows)
    method = varaccel.ImageGeneration(accelerator)
    drawn = model.generate(**call, image_sizes=sizes, prefix_allowed_tokens_fn=rows, custom_generate=method)
    assert torch.equal(drawn, expected)
    accelerated = varaccel.accelerate(model, accelerator)
    assert torch.equal(accelerated.generate(**call, image_sizes=sizes), expected)
    assert torch.equal(accelerated.generate(**call, prefix_allowed_tokens_fn=rows), expected), "as before"


def text_only() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))


def emu3_generated(**options: Any) -> Tensor:
    model, call, _ = emu3_call(**options)
    return model.generate(**call, custom_generate=varaccel.ImageGeneration("plain"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: varaccel.accelerate(text_only(), "jacobi"),
            "LlamaForCausalLM draws no images token by token",
        ),
        (lambda: varaccel.accelerate(tiny.janus(), "jacoby"), "unknown accelerator 'jacoby'"),
        (lambda: varaccel.accelerate(tiny.janus(), "code"), "code"),
        (lambda: emu3_generated(image_sizes=None), "image_sizes"),
        (lambda: emu3_generated(image_sizes=[[3, 4], [4, 3]]), "one size"),
        (lambda: emu3_generated(max_new_tokens=9), "has 15 tokens, got max_new_tokens=9"),
        (
            lambda: varaccel.accelerate(
                tiny.janus(), "speculative", draft_model=tiny.janus(codes=8)
            ).generate(**janus_inputs()),
            "number of token ids 8 instead of 24",
        ),
        (
            lambda: varaccel.accelerate(tiny.janus()).generate(**janus_inputs(repetition_penalty=2.0)),
            "RepetitionPenaltyLogitsProcessor",
        ),
        (lambda: varaccel.accelerate(tiny.janus()).generate(**janus_inputs(num_beams=2)), "num_beams"),
        (
            lambda: varaccel.accelerate(tiny.janus()).generate(**janus_inputs(return_dict_in_generate=True)),
            "return_dict_in_generate",
        ),
    ],
    ids=[
        "text only",
        "unknown",
        "other hosts",
        "no size",
        "sizes",
        "too few tokens",
        "draft vocabulary",
        "penalty",
        "beams",
        "dictionary",
    ],
)
def test_what_cannot_be_is_one_sentence(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)
