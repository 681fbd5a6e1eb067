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
from varaccel.errors import InputError

PROMPTS = ["a red sphere", "a blue cube left of a red sphere"]


def janus_inputs(**options: Any) -> dict[str, Any]:
    inputs = tiny.janus_processor()(text=PROMPTS, generation_mode="image", padding=True, return_tensors="pt")
    return {**inputs, "generation_mode": "image", "guidance_scale": 5.0, **options}


@pytest.mark.parametrize("accelerator", ["plain", "jacobi", "speculative", "auto"])
def test_greedy_images_are_those_of_the_models_own_generate(accelerator: str) -> None:
    model, inputs = tiny.janus(), janus_inputs(do_sample=False)
    expected = model.generate(**inputs)
    accelerated = varaccel.accelerate(model, accelerator)
    assert accelerated is model
    assert torch.equal(model.generate(**inputs), expected)
    varaccel.accelerate(model, None)
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**inputs), expected)


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
    expected = model.generate(**inputs)
    varaccel.accelerate(model, varaccel.Speculative("small", 3), draft_model=tiny.janus(layers=2))
    assert torch.equal(model.generate(**inputs), expected)


def test_weights_stay_as_they_are() -> None:
    model = tiny.janus()
    before = copy.deepcopy(model.state_dict())
    varaccel.accelerate(model, "jacobi").generate(**janus_inputs(do_sample=False))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def text_only() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: varaccel.accelerate(text_only(), "jacobi"),
            "LlamaForCausalLM draws no images token by token",
        ),
        (lambda: varaccel.accelerate(tiny.janus(), "jacoby"), "unknown accelerator 'jacoby'"),
        (lambda: varaccel.accelerate(tiny.janus(), "code"), "code"),
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
    ids=["text only", "unknown", "other hosts", "draft vocabulary", "penalty", "beams", "dictionary"],
)
def test_what_cannot_be_is_one_sentence(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)
