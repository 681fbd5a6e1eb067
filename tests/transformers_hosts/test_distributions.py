"""Whole images of a 2 × 2 Janus follow the distribution that the model's own modules say, by every lossless method."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import varaccel
from tests import tiny_transformers as tiny
from tests.enumeration import LIMIT, exact_distribution, misfit
from varaccel.accelerators import AnyAccelerator
from varaccel.hosts.causal.sampling import Sampling
from varaccel.models.transformers_host.janus import JanusHost
from varaccel.nn.condition import Condition
from varaccel.pipelines.janus import JanusPipeline

pytestmark = pytest.mark.slow

CODES, SIDE, SCALE, IMAGES = 3, 2, 2.0, 1500
PROMPTS = ["a red sphere", "a blue cube left of a green cone"]
GROUPS = ((0, 1, 2, 3), (0, 3), (1, 2))
SETTINGS = {
    "free": (1.0, Sampling(4.0)),
    "guided": (SCALE, Sampling(6.0)),
    "filtered": (SCALE, Sampling(3.0, top_k=2)),
    "nucleus": (SCALE, Sampling(6.0, top_p=0.8)),
}
SHARP = {"sharp": (3.0, Sampling(2.0))}
"""Where a mistake in the prompts changes more than at the temperatures above."""
BUSHY = [[0], [1], [0, 0]]
LOSSLESS: list[AnyAccelerator] = [
    varaccel.Plain(),
    varaccel.Jacobi(4, coupling="none"),
    varaccel.Jacobi(4, coupling="maximal"),
    varaccel.Jacobi(4),
    varaccel.Speculative("layers", 3),
    varaccel.Speculative("small", BUSHY),
    varaccel.Speculative("layers", BUSHY, verification="k_sequential"),
    varaccel.Speculative("small", 3, verification="gumbel"),
    varaccel.Speculative("layers", {"depth": 2, "top_k": 2, "total": 5}),
    varaccel.Auto(),
]


@cache
def pipeline() -> JanusPipeline:
    sizes = {"grid": SIDE, "codes": CODES, "heads": 2, "kv_heads": 1}
    pipe = JanusPipeline(
        tiny.janus(layers=2, **sizes), tiny.janus_processor(), draft_model=tiny.janus(layers=1, **sizes)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def distribution(prompt: str, setting: str) -> Tensor:
    """[V, V, V, V] by teacher forcing through the model's own modules."""
    scale, sampling = {**SETTINGS, **SHARP}[setting]
    model: Any = pipeline().model
    inputs = pipeline().processor(text=prompt, generation_mode="image", return_tensors="pt")["input_ids"]
    begin = model.generation_config.generation_kwargs["boi_token_id"]
    empty = inputs.where((inputs == 1) | (inputs == begin), 0)

    def branch(prompt_ids: Tensor, tokens: Tensor) -> Tensor:
        words = model.get_input_embeddings()(prompt_ids.expand(len(tokens), -1))
        x = torch.cat([words, model.prepare_embeddings_for_image_generation(tokens[:, :-1])], 1)
        features = model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
        logits: Tensor = model.model.generation_head(features[:, prompt_ids.shape[1] - 1 :])
        return logits.float()

    def logits(tokens: Tensor) -> Tensor:
        conditional, unconditional = branch(inputs, tokens), branch(empty, tokens)
        return unconditional + scale * (conditional - unconditional)

    return exact_distribution(logits, CODES, SIDE**2, sampling)


def worst(accelerator: AnyAccelerator, setting: str) -> float:
    """The misfit of the images of two prompts in one batch, the worse of both."""
    scale, sampling = {**SETTINGS, **SHARP}[setting]
    result: Any = pipeline()(
        PROMPTS,
        num_images_per_prompt=IMAGES,
        guidance_scale=scale,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        accelerator=accelerator,
        output_type="latent",
        seed=0,
    )
    assert result.stats.lossless
    return max(
        misfit(images, distribution(prompt, setting), GROUPS)
        for prompt, images in zip(PROMPTS, result.images.split(IMAGES), strict=True)
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("accelerator", LOSSLESS, ids=str)
def test_images_follow_the_distribution(accelerator: AnyAccelerator, setting: str) -> None:
    assert worst(accelerator, setting) < LIMIT


def test_another_unconditional_prompt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that a host can make most easily: padding where the published code keeps a token."""
    monkeypatch.setattr(JanusHost, "unconditional", lambda host, values: torch.zeros_like(values))
    assert worst(varaccel.Jacobi(4), "sharp") > 2 * LIMIT


def test_a_padded_prompt_that_is_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter prompt is padded; without its mask the padding would be a part of it."""
    tokenized = JanusPipeline._tokenized

    def without_mask(pipe: JanusPipeline, prompts: list[str | int], size: Any) -> Condition:
        return Condition(tokenized(pipe, prompts, size).values)

    monkeypatch.setattr(JanusPipeline, "_tokenized", without_mask)
    assert worst(varaccel.Jacobi(4), "sharp") > 2 * LIMIT
