"""Hosts whose weights lie on several devices, or on disk until they are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import varaccel
from tests import tiny_transformers as tiny
from tests.transformers_cases import quiet
from varaccel.accelerators import AnyAccelerator
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.session import CausalSession, DraftInputs
from varaccel.models.transformers_host.janus import JanusHost
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.spread_cache import SpreadCache
from varaccel.pipelines.janus import JanusPipeline

PROMPTS = ["a red sphere", "a blue cube left of a red sphere"]
ACCELERATORS: list[AnyAccelerator] = [
    varaccel.Plain(),
    varaccel.Jacobi(4),
    varaccel.Speculative("layers", 3),
    varaccel.Speculative("layers", "dynamic"),
]


def drawn(pipe: Any, accelerator: AnyAccelerator) -> tuple[Tensor, int]:
    """Token ids, and the bytes of the caches."""
    result = pipe(PROMPTS, temperature=2.0, seed=0, accelerator=accelerator, output_type="latent")
    return result.images, result.stats.cache_bytes


def pipeline() -> Any:
    return quiet(JanusPipeline(tiny.janus(), tiny.janus_processor()))


def spread(model: Any, places: list[Any]) -> None:
    """Hooks as `device_map` makes them, with layer i on device i, and everything else on the first."""
    decoder = model.model.language_model
    for part in (model, model.model.generation_embeddings, model.model.generation_aligner):
        add_hook_to_module(part, AlignDevicesHook(execution_device=places[0]))
    for layer, place in zip(decoder.layers, places, strict=True):
        add_hook_to_module(layer, AlignDevicesHook(execution_device=place))
    for part in (decoder.norm, model.model.generation_head):  # the last parts follow the last layer
        add_hook_to_module(part, AlignDevicesHook(execution_device=places[-1]))
    add_hook_to_module(decoder.rotary_emb, AlignDevicesHook(execution_device=places[0]))


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
def test_layers_on_several_devices_draw_the_same(accelerator: AnyAccelerator) -> None:
    """One device by two names: the cache has a part for each, and its numbers can be looked at."""
    whole, pipe = pipeline(), pipeline()
    spread(pipe.model, ["cpu", "cpu:0", "cpu"])
    assert isinstance(pipe.transformer.new_cache(1, 1), SpreadCache)
    expected, found = drawn(whole, accelerator), drawn(pipe, accelerator)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_nothing_meets_on_different_devices() -> None:
    """Two GPUs that this machine has not, in a mode that computes no numbers but refuses to mix devices."""
    places = [torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:1")]
    tokens = torch.tensor([[1, 7, 8, 9, 3]]).repeat(2, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny.janus()
        last = {*model.model.language_model.norm.modules(), *model.model.generation_head.modules()}
        for number, layer in enumerate(model.model.language_model.layers):
            move(layer.modules(), places[number])
        move(last, places[-1])
        move(model.modules(), places[0])
        spread(model, places)
        session = CausalSession(
            JanusHost(model),
            Condition(tokens.to(places[0])),
            (Grid(4, 4),),
            guidance=Guidance(3.0),
            draft_slots=3,
        )
        assert session.first_distribution().probs.device == places[0]
        drafts = torch.tensor([[0, 1, 2]] * 2, device=places[0])
        features = session.read(DraftInputs(drafts, drafts, drafts), length=3)
        assert session.distribution(features, drafts + 1).probs.device == places[0]
        session.cache_slots.keep(drafts, drafts)
        cache: Any = session.cache
        assert [part.keys.device for part in cache.parts.values()] == [places[0], places[1]]
        assert [len(part.keys) for part in cache.parts.values()] == [1, 2]


def move(parts: Any, place: torch.device) -> None:
    """Give modules weights on another device, once."""
    for part in parts:
        for table in (part._parameters, part._buffers):
            for name, weight in table.items():
                if weight is not None and not weight.is_cuda:
                    moved = torch.empty_like(weight, device=place)
                    table[name] = nn.Parameter(moved) if isinstance(weight, nn.Parameter) else moved
