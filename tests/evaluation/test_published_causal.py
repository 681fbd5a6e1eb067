"""The published loops of LlamaGen and Janus, said again: the same greedy images as ours and as recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_cases import llamagen_cases, llamagen_condition, llamagen_model, llamagen_tensors
from tests.tiny import PROMPTS, pipeline
from tests.transformers_cases import janus_pipeline
from varaccel.evaluation.published import janus, llamagen

BATCHES = (1, 3)


def ours(pipe: Any, prompts: Any, scale: float, **options: Any) -> Tensor:
    out = pipe(prompts, temperature=0, guidance_scale=scale, output_type="latent", **options)
    return out.images.flatten(1)


def llamagen_loop(model_type: str, batch: int, scale: float, **options: Any) -> Tensor:
    pipe: Any = pipeline(model_type)
    given = pipe._condition(PROMPTS[model_type][:batch])
    return llamagen.published_loop(
        pipe.transformer, given.values, given.mask, cfg=scale, temperature=0, **options
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_llamagen_draws_the_same_greedy_images(model_type: str, batch: int, scale: float) -> None:
    theirs = llamagen_loop(model_type, batch, scale)
    assert theirs.equal(ours(pipeline(model_type), PROMPTS[model_type][:batch], scale))
    assert theirs.unique().numel() > 1
    # what is drawn does not depend on where the loop ends
    assert llamagen_loop(model_type, batch, scale, tokens=5).equal(theirs[:, :5])


RECORDED = [
    (model_type, run)
    for model_type, case in (("c2i", "c2i_greedy_raster"), ("t2i", "t2i_greedy"))
    for run in llamagen_cases()[case]["runs"]
    if run["key"].startswith("raster")
]


@pytest.mark.parametrize(
    ("model_type", "run"), RECORDED, ids=lambda value: value if isinstance(value, str) else value["key"]
)
def test_llamagen_draws_what_the_published_code_drew(model_type: str, run: dict[str, Any]) -> None:
    condition, mask = llamagen_condition(model_type)
    golden = llamagen_tensors("c2i_greedy_raster" if model_type == "c2i" else "t2i_greedy")
    drawn = llamagen.published_loop(
        llamagen_model(model_type),
        condition,
        mask,
        cfg=run["cfg_scale"],
        interval=run.get("cfg_interval", -1),
        temperature=0,
    )
    assert drawn.equal(golden[run["key"]])


@pytest.mark.parametrize(
    "combo", llamagen_cases()["sampling_filter"]["combos"], ids=lambda c: f"filter{c['id']}"
)
def test_llamagen_filters_as_recorded(combo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = llamagen_tensors("sampling_filter")
    seen: list[Tensor] = []

    def multinomial(probs: Tensor, count: int, **_: Any) -> Tensor:
        seen.append(probs)
        return probs.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    logits = tensors["logits"][: combo["rows"]].clone().unsqueeze(1)
    llamagen._drawn(logits, combo["temperature"], combo["top_k"], combo["top_p"], None)
    torch.testing.assert_close(seen[0], tensors[f"probs_{combo['id']}"], atol=1e-6, rtol=0)


def test_llamagen_draws_follow_the_distribution() -> None:
    """At a temperature that leaves two tokens likely, both are drawn, and none that the filter dropped."""
    logits = torch.tensor([0.0, 1.0, -9.0, 1.0]).log_softmax(0).expand(400, 1, -1)
    drawn = llamagen._drawn(logits, 1.0, 2, 1.0, torch.Generator().manual_seed(0)).flatten()
    counts = drawn.bincount(minlength=4).tolist()
    assert counts[0] == counts[2] == 0
    assert min(counts[1], counts[3]) > 150


def janus_loop(prompt: str, batch: int, scale: float, **options: Any) -> Tensor:
    pipe: Any = janus_pipeline()
    prompts = torch.tensor([pipe._prompt_ids(prompt, None)] * batch)
    return janus.published_loop(pipe.model, prompts, cfg=scale, **options)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_janus_draws_the_same_greedy_images(batch: int, scale: float) -> None:
    prompt = "a blue cube left of a red sphere"
    theirs = janus_loop(prompt, batch, scale, temperature=0)
    assert theirs.equal(ours(janus_pipeline(), prompt, scale, num_images_per_prompt=batch).to(theirs.dtype))
    assert theirs.unique().numel() > 1
    assert janus_loop(prompt, batch, scale, temperature=0, tokens=5).equal(theirs[:, :5])


def test_janus_draws_of_one_generator() -> None:
    first, again, other = (
        janus_loop("a red sphere", 3, 5.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert first.equal(again)
    assert not first.equal(other)
    assert not first[0].equal(first[1])  # images of one prompt differ


def test_a_planted_difference_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above see it where a loop leaves out the rotation, or the prompt of the unconditional row."""
    expected = llamagen_loop("c2i", 3, 3.0)
    monkeypatch.setattr(llamagen, "rotate", lambda x, rotary: x)
    assert not llamagen_loop("c2i", 3, 3.0).equal(expected)
    prompt, pipe = "a blue cube left of a red sphere", janus_pipeline()
    expected = janus_loop(prompt, 1, 5.0, temperature=0)
    monkeypatch.setattr(pipe.model.generation_config, "pad_token_id", 5)
    assert not janus_loop(prompt, 1, 5.0, temperature=0).equal(expected)
