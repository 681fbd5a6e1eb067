"""What people get wrong with models of transformers, and what is said of it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import varaccel
from tests import tiny_transformers as tiny
from tests.tiny_emu3 import emu3, emu3_processor
from tests.transformers_cases import CASES
from tests.transformers_hosts.test_generate import janus_inputs
from varaccel.errors import CheckpointError, InputError
from varaccel.pipelines.janus import JanusPipeline

WITH_PROMPTS = ["janus", "chameleon", "emu3", "glm-image"]


def one_sentence(error: pytest.ExceptionInfo[Any]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize("case", WITH_PROMPTS)
def test_the_token_of_an_image_to_read_is_no_prompt(case: str) -> None:
    with pytest.raises(
        InputError, match="'<image>', which stands for an image that the model reads"
    ) as raised:
        CASES[case].pipeline()("a red <image>", output_type="latent")
    assert one_sentence(raised)


@pytest.mark.parametrize("case", WITH_PROMPTS)
def test_a_lone_surrogate_counts_as_a_question_mark(case: str) -> None:
    pipe, options = CASES[case].pipeline(), {"output_type": "latent", "seed": 0}
    broken, mended = (pipe(prompt, **options).images for prompt in ("cone \ud800", "cone ?"))
    assert torch.equal(broken, mended)


@pytest.mark.parametrize("case", ["janus", "chameleon", "emu3"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_negative_prompts_are_counted_with_and_without_guidance(case: str, scale: float) -> None:
    options: dict[str, Any] = {"guidance_scale": scale, "output_type": "latent"}
    with pytest.raises(InputError, match="there are 3 negative prompts for 2 prompts"):
        CASES[case].pipeline()(["a", "a cone"], negative_prompt=["a", "blue", "cone"], **options)


@pytest.mark.parametrize("case", [*WITH_PROMPTS, "imagegpt"])
def test_a_processor_of_another_model_is_refused(case: str) -> None:
    pipe: Any = CASES[case].pipeline()
    other = emu3_processor() if case != "emu3" else tiny.janus_processor()
    for wrong in (other, tiny.janus_processor().tokenizer):
        with pytest.raises(InputError, match=f"got {type(wrong).__name__}") as raised:
            type(pipe)(pipe.model, wrong)
        assert one_sentence(raised)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"eagle_head": "head"}, "eagle_head must be an EagleHead, got str"),
        ({"eagle_head": tiny.janus(layers=1)}, "signature is a draft_model"),
        (
            {"draft_model": emu3(layers=1)},
            "draft_model of a JanusPipeline is a JanusForConditionalGeneration",
        ),
    ],
    ids=["text", "network as head", "other model"],
)
def test_what_is_no_drafter_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        JanusPipeline(tiny.janus(), tiny.janus_processor(), **parts)


@pytest.mark.parametrize("name", ["model", "processor", "draft_model"])
def test_components_that_others_were_made_of_cannot_be_exchanged(name: str) -> None:
    pipe = copy.deepcopy(CASES["janus"].pipeline())
    before = getattr(pipe, name)
    setattr(pipe, name, before)
    with pytest.raises(InputError, match=rf"JanusPipeline.from_pipe\(pipe, {name}=...\)"):
        setattr(pipe, name, copy.deepcopy(before))
    assert getattr(pipe, name) is before


# -- damaged files -----------------------------------------------------------------------------------------


@pytest.fixture(params=["model", "pipeline"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A Janus in transformers' layout, or in that of pipelines, and the file of its weights."""
    pipe = JanusPipeline(tiny.janus(), tiny.janus_processor())
    if request.param == "pipeline":
        pipe.save_pretrained(tmp_path)
        return tmp_path, tmp_path / "model" / "model.safetensors"
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    return tmp_path, tmp_path / "model.safetensors"


def test_missing_weights_are_not_drawn_at_random(saved: tuple[Path, Path]) -> None:
    folder, weights = saved
    state = load_file(weights)
    lost = next(name for name in state if "language_model.layers.1." in name)
    save_file({name: value for name, value in state.items() if name != lost}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {lost}") as raised:
        varaccel.AutoPipeline.from_pretrained(folder)
    assert one_sentence(raised)


def test_a_file_that_was_cut_off_is_told(saved: tuple[Path, Path]) -> None:
    folder, weights = saved
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded") as raised:
        varaccel.AutoPipeline.from_pretrained(folder)
    assert one_sentence(raised)


# -- inside generate() -------------------------------------------------------------------------------------


def test_a_copy_of_an_accelerated_model_draws_with_its_own_weights() -> None:
    model, inputs = varaccel.accelerate(tiny.janus(), "jacobi"), janus_inputs(do_sample=False)
    expected = model.generate(**inputs)
    copied = copy.deepcopy(model)
    unpickled = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert not torch.equal(model.generate(**inputs), expected)
    for other in (copied, unpickled):
        assert vars(other)["generate"].model is other
        assert torch.equal(other.generate(**inputs), expected)


@pytest.mark.parametrize(
    "draft",
    ["a name", emu3(layers=1), JanusPipeline(tiny.janus(), tiny.janus_processor())],
    ids=lambda draft: type(draft).__name__,
)
def test_what_is_no_draft_model_is_refused_in_generate(draft: Any) -> None:
    model = varaccel.accelerate(tiny.janus(), "speculative", draft_model=draft)
    with pytest.raises(
        InputError, match=f"JanusForConditionalGeneration of transformers, got {type(draft).__name__}"
    ):
        model.generate(**janus_inputs())


def test_embedded_prompts_are_refused_in_generate() -> None:
    inputs = janus_inputs()
    inputs.pop("input_ids")
    with pytest.raises(InputError, match="pass input_ids"):
        varaccel.accelerate(tiny.janus(), "plain").generate(inputs_embeds=torch.zeros(2, 10, 32), **inputs)
