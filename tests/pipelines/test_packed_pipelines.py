"""Calls with packed weights: the images of usual products, networks as they were, smaller weights on request."""

from __future__ import annotations

import copy

import pytest
import torch

from varaccel import AutoPipeline, Jacobi
from varaccel.errors import InputError
from varaccel.nn import packed_weights as packing
from varaccel.nn.packed_weights import usual_products

MODELS = {
    "mini-llamagen": {"temperature": 0.0},
    "mini-var": {},
    "mini-mar": {"num_iterations": 4, "head_steps": 8},
}

pytestmark = pytest.mark.skipif(not packing._on_processor(), reason="packed weights are for x86 processors")


@pytest.mark.parametrize("model", list(MODELS))
def test_images_are_those_of_usual_products(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = AutoPipeline.from_pretrained(model)
    weights = copy.deepcopy(pipe.transformer.state_dict())
    packed: list[int] = []
    pack = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda w, b: packed.append(w.numel()) or pack(w, b))
    found = pipe(["a red sphere", "a blue cube"], seed=3, output_type="raw", **MODELS[model])
    assert packed
    count = len(packed)
    with usual_products():
        expected = pipe(["a red sphere", "a blue cube"], seed=3, output_type="raw", **MODELS[model])
    assert len(packed) == count
    # rounding may turn a draw of one token in many thousands
    assert float((found.images - expected.images).abs().mean()) < 1e-3
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


def test_drafting_calls_read_packed_weights() -> None:
    pipe = AutoPipeline.from_pretrained("mini-llamagen")
    call = {"seed": 1, "output_type": "latent", "temperature": 0.0}
    plain = pipe("a red sphere", **call).images
    assert torch.equal(pipe("a red sphere", accelerator=Jacobi(window=8), **call).images, plain)


def test_smaller_weights_on_request() -> None:
    pipe = AutoPipeline.from_pretrained("mini-llamagen", quantize="float16")
    shipped = AutoPipeline.from_pretrained("mini-llamagen").transformer.state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in pipe.transformer.state_dict().items())
    with torch.no_grad():
        pipe.transformer.output.weight.add_(1e-5)
    pipe.quantize()
    weight = pipe.transformer.output.weight
    assert torch.equal(weight, weight.half().float())


def test_smaller_weights_that_cannot_be() -> None:
    with pytest.raises(InputError, match="unknown quantize 'int3'"):
        AutoPipeline.from_pretrained("mini-llamagen", quantize="int3")
    with pytest.raises(InputError, match="float32 weights on a CPU"):
        AutoPipeline.from_pretrained("mini-llamagen", dtype=torch.bfloat16, quantize="float16")
