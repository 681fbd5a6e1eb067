"""diffusers' model offloading: every component is on the device while it works, and on the CPU while it does not.

There is one device here, so a component that is away has NaN for weights: whatever reads them shows it in the image.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, ModelHook, UserCpuOffloadHook, add_hook_to_module
from PIL import Image
from torch import Tensor, nn

import varaccel
from tests import tiny_glm_image, tiny_transformers
from tests.tiny import PROMPTS, drafting_pipeline, new_pipeline
from tests.tiny_chameleon import chameleon, chameleon_processor
from tests.tiny_emu3 import emu3, emu3_processor
from tests.transformers_cases import quiet
from tests.transformers_hosts.test_chameleon import decoder as chameleon_decoder
from varaccel import CoDe, CSpD
from varaccel.accelerators import AnyAccelerator
from varaccel.pipelines.chameleon import ChameleonPipeline
from varaccel.pipelines.emu3 import Emu3Pipeline
from varaccel.pipelines.glm_image import GlmImagePipeline
from varaccel.pipelines.janus import JanusPipeline
from varaccel.pipelines.offloading import bring


class Weights:
    """The weights of a component while it is away."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, module: nn.Module) -> None:
        with torch.no_grad():
            for name, weight in module.named_parameters():
                self.kept[name] = weight.clone()
                weight.fill_(torch.nan)

    def give(self, module: nn.Module) -> None:
        with torch.no_grad():
            for name, weight in module.named_parameters():
                weight.copy_(self.kept.pop(name))


class Moves(CpuOffload):
    """accelerate's hook, but that moves between having weights and having none; it notes them in `log`."""

    log: list[tuple[str, type[nn.Module]]]

    def __init__(self, prev: UserCpuOffloadHook | None, log: list[Any]) -> None:
        super().__init__("cpu", prev)
        self.weights, self.log, self.away = Weights(), log, False

    def init_hook(self, module: nn.Module) -> nn.Module:
        if not self.away:
            self.weights.take(module)
            self.away = True
            self.log.append(("out", type(module)))
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.prev_module_hook is not None:
            self.prev_module_hook.offload()
        if self.away:
            self.weights.give(module)
            self.away = False
            self.log.append(("in", type(module)))
        return args, kwargs

    def detach_hook(self, module: nn.Module) -> nn.Module:
        if self.away:
            self.weights.give(module)
        return module


@pytest.fixture
def offload(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """`enable_model_cpu_offload` with `Moves`: what it returns is their log."""
    log: list[Any] = []

    def hooked(model: nn.Module, device: Any = None, prev_module_hook: Any = None) -> Any:
        hook = Moves(prev_module_hook, log)
        add_hook_to_module(model, hook, append=True)
        return model, UserCpuOffloadHook(model, hook)

    monkeypatch.setattr(accelerate, "cpu_offload_with_hook", hooked)

    def enable(pipe: Any) -> list[Any]:
        pipe.enable_model_cpu_offload(device="cpu")
        log.clear()
        return log

    return enable


def causal(kind: str) -> Any:
    shared: Any = drafting_pipeline(kind)
    parts = copy.deepcopy(shared.components)  # those of other tests keep their weights
    return quiet(type(shared)(**{**parts, **new_settings(shared)}))


def new_settings(pipe: Any) -> dict[str, Any]:
    return {"class_names": pipe.config.class_names, "guidance_scale": 2.0}


def janus() -> Any:
    model, draft = tiny_transformers.janus(), tiny_transformers.janus(layers=2)
    return JanusPipeline(model, tiny_transformers.janus_processor(), draft_model=draft)


def anole() -> Any:
    return ChameleonPipeline(
        chameleon(), chameleon_processor(), image_decoder=chameleon_decoder(), draft_model=chameleon(layers=2)
    )


def emu() -> Any:
    return Emu3Pipeline(emu3(), emu3_processor(), height=16, width=24, draft_model=emu3(layers=2))


def glm_image() -> Any:
    return GlmImagePipeline(
        tiny_glm_image.glm_image(layers=2),
        tiny_glm_image.processor(preview=8),
        **tiny_glm_image.decoder(),
        height=64,
        width=96,
        num_inference_steps=2,
        draft_model=tiny_glm_image.glm_image(layers=1),
    )


CASES: dict[str, tuple[Callable[[], Any], Any, AnyAccelerator | str]] = {
    "c2i": (lambda: causal("c2i"), PROMPTS["c2i"][0], "plain"),
    "c2i, EAGLE": (lambda: causal("c2i"), PROMPTS["c2i"][0], varaccel.Speculative("eagle", 3)),
    "t2i, smaller model": (lambda: causal("t2i"), PROMPTS["t2i"][0], varaccel.Speculative("small", 3)),
    "t2i, LANTERN": (lambda: causal("t2i"), PROMPTS["t2i"][0], varaccel.Lantern(k=3, drafter="small")),
    "var": (lambda: new_pipeline("var-class"), 1, "plain"),
    "var, CoDe": (lambda: new_pipeline("var-caption"), PROMPTS["t2i"][0], CoDe(draft_scales=1)),
    "infinity": (lambda: new_pipeline("infinity"), PROMPTS["infinity"][0], "plain"),
    "infinity, CoDe": (lambda: new_pipeline("infinity"), PROMPTS["infinity"][0], CoDe(draft_scales=1)),
    "mar": (lambda: new_pipeline("mar-class"), 1, "plain"),
    "mar, CSpD": (lambda: new_pipeline("mar-caption"), PROMPTS["t2i"][0], CSpD()),
    "janus": (janus, "a red sphere", varaccel.Speculative("small", 3)),
    "chameleon": (anole, "a red sphere", varaccel.Speculative("small", 3)),
    "emu3": (emu, "a red sphere", varaccel.Speculative("small", 3)),
    "glm-image": (glm_image, "a red 'sphere'", varaccel.Speculative("small", 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_images_and_previews_are_those_without_offloading(case: str, offload: Any) -> None:
    make, prompt, accelerator = CASES[case]
    pipe = quiet(make())
    previews: list[Any] = []

    def look(pipe: Any, step: int, decided: Any, shown: dict[str, Any]) -> None:
        if step == 1:
            previews.append(shown["preview"]())

    def draw(**options: Any) -> Any:
        return pipe(prompt, seed=0, accelerator=accelerator, output_type="np", **options).images

    expected = draw(callback_on_step_end=look)
    log = offload(pipe)
    for options in ({}, {"callback_on_step_end": look}):
        np.testing.assert_array_equal(draw(**options), expected)
        assert all(part._hf_hook.away for part in pipe._networks()), "all are free after the call"
    np.testing.assert_array_equal(previews[1], previews[0])
    assert log, "something was moved"


def test_parts_come_in_turn_and_only_those_at_work_stay(offload: Any) -> None:
    pipe = causal("t2i")
    log = offload(pipe)
    there: list[set[str]] = []

    def look(*_: Any) -> None:
        there.append(
            {name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")} - away(pipe)
        )

    pipe(PROMPTS["t2i"][0], seed=0, accelerator="plain", callback_on_step_end=look)
    assert all(names == {"transformer", "eagle_head", "draft_transformer"} for names in there)
    text, network, head, image = (
        type(part) for part in (pipe.text_encoder, pipe.transformer, pipe.eagle_head, pipe.vq_model)
    )
    assert log[:2] == [("in", text), ("out", text)]
    assert sorted(map(str, log[2:5])) == sorted(map(str, [("in", network), ("in", network), ("in", head)]))
    came = log.index(("in", image))
    assert log[5:came].count(("out", network)) == 2
    assert ("out", head) in log[5:came]
    assert ("in", network) not in log[came:]


def away(pipe: Any) -> set[str]:
    return {
        name
        for name, part in pipe.components.items()
        if getattr(part, "_hf_hook", None) and part._hf_hook.away
    }


@pytest.mark.parametrize("kind", ["c2i", "t2i", "var-class", "infinity"])
def test_painting_into_an_image(kind: str, offload: Any) -> None:
    pipe: Any = new_pipeline(kind)
    size = pipe.image_size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    for prompt in (None, PROMPTS[kind.removeprefix("c2i-")][0]):
        expected = pipe.inpaint(image, mask, prompt, seed=0, output_type="np").images
        offload(pipe)
        np.testing.assert_array_equal(
            pipe.inpaint(image, mask, prompt, seed=0, output_type="np").images, expected
        )
        pipe.remove_all_hooks()


@pytest.mark.parametrize("kind", ["c2i", "var-class", "mar-class"])
def test_a_call_within_a_callback_and_previews_of_others(kind: str, offload: Any) -> None:
    """Whatever had its turn meanwhile, the call goes on with its own networks."""
    pipe: Any = new_pipeline(kind)
    expected = pipe(1, seed=0, output_type="np").images
    kept: list[Callable[[], Any]] = []
    offload(pipe)

    def look(pipe: Any, step: int, decided: Any, shown: dict[str, Any]) -> None:
        if step != 1:
            return
        kept.append(shown["preview"])
        np.testing.assert_array_equal(pipe(1, seed=0, output_type="np").images, expected)
        thread = threading.Thread(target=shown["preview"])
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), "nobody waits for whoever waits for it"

    np.testing.assert_array_equal(
        pipe(1, seed=0, output_type="np", callback_on_step_end=look).images, expected
    )
    first = kept[0]()
    assert np.isfinite(first).all()
    assert all(part._hf_hook.away for part in pipe._networks()), "a late preview leaves nothing on the device"
    np.testing.assert_array_equal(kept[0](), first)


def test_drafters_of_other_pipelines_are_moved_too(offload: Any) -> None:
    pipe, other = new_pipeline("c2i"), new_pipeline("c2i")
    small = varaccel.Speculative(other, 3)
    expected = pipe(1, seed=0, accelerator=small, output_type="np").images
    log = offload(other)
    np.testing.assert_array_equal(pipe(1, seed=0, accelerator=small, output_type="np").images, expected)
    assert log == [("in", type(other.transformer))]


def test_generate_of_a_model_that_is_offloaded(offload: Any) -> None:
    """Another pipeline's model: diffusers' pipelines call `generate`, which is not `forward`."""
    pipe = janus()
    model = varaccel.accelerate(pipe.model, "jacobi")
    inputs = pipe.processor(text=["a red sphere"], generation_mode="image", return_tensors="pt")
    options = {**inputs, "generation_mode": "image", "do_sample": False}
    expected = model.generate(**options)
    offload(pipe)
    assert torch.equal(model.generate(**options), expected)


def test_accelerates_own_hooks() -> None:
    pipe = causal("t2i")
    expected = pipe(PROMPTS["t2i"][0], seed=0, output_type="np", accelerator="speculative").images
    pipe.enable_model_cpu_offload(device="cpu")
    drawn = pipe(PROMPTS["t2i"][0], seed=0, output_type="np", accelerator="speculative").images
    np.testing.assert_array_equal(drawn, expected)
    assert all(isinstance(part._hf_hook, CpuOffload) for part in pipe._networks())
    pipe.remove_all_hooks()


def test_without_hooks_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = causal("t2i")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("moved")

    monkeypatch.setattr(nn.Module, "to", refuse)
    monkeypatch.setattr(CpuOffload, "pre_forward", refuse)
    pipe(PROMPTS["t2i"][0], seed=0, accelerator="speculative")


def test_hooks_of_other_kinds_are_left_alone() -> None:
    """One that loads weights for `forward` alone would never be told that they can go."""

    class Other(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("called")

    part = nn.Linear(1, 1)
    add_hook_to_module(part, Other())
    bring([part, None, "no module"], [part, nn.Linear(1, 1)])


def test_several_parts_of_a_chain_are_there_together() -> None:
    """In whatever order they are named; a hook alone sends away the one before its own."""
    log: list[Any] = []
    parts = [nn.Linear(1, 1), nn.ReLU(), nn.GELU(), nn.Conv1d(1, 1, 1)]
    before = None
    for part in parts:
        hook = Moves(before, log)
        add_hook_to_module(part, hook)
        before = UserCpuOffloadHook(part, hook)
    for wanted in ([0, 1], [1, 0], [0, 1, 2, 3], [2, 0, 1], [3], []):
        bring([parts[i] for i in wanted], parts)
        assert [i for i, part in enumerate(parts) if not part._hf_hook.away] == sorted(wanted)
    log.clear()
    bring([parts[3], parts[2]], parts)
    bring([parts[3], parts[2]], parts)
    assert log == [("in", nn.Conv1d), ("in", nn.GELU)], "each is moved once"
