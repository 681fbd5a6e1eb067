"""What every registered accelerator owes on every host of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.transformers_cases import CASES, HostCase
from varaccel.accelerators import fitting
from varaccel.hosts.causal.job import CausalJob

HOSTS: dict[str, HostCase] = {}
for _case in CASES.values():  # the first of each pipeline class
    HOSTS.setdefault(_case.pipeline().family, _case)

every = pytest.mark.parametrize(
    ("host", "name"),
    [(host, name) for host in HOSTS for name in fitting(CausalJob)],
)


def drawn(host: str, name: str, prompts: Any = None, **options: Any) -> Any:
    case = HOSTS[host]
    # at the defaults of random models nearly every token is the likeliest one
    call = {"temperature": 1.5, "top_p": 1.0, "output_type": "latent", **case.options, **options}
    return case.pipeline()(list(case.prompts) if prompts is None else prompts, accelerator=name, **call)


@every
def test_fills_the_canvas(host: str, name: str) -> None:
    out = drawn(host, name, seed=3)
    assert len(out.images) == 3
    assert (out.written > 0).all()
    assert 0 <= int(out.images.min()) <= int(out.images.max()) < HOSTS[host].pipeline().transformer.vocab_size
    assert not out.stats.interrupted


@every
def test_deterministic_under_a_seed(host: str, name: str) -> None:
    first, again, other = (drawn(host, name, seed=seed).images for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every
def test_independent_of_the_batch(host: str, name: str) -> None:
    together = drawn(host, name, seed=11).images
    for index, prompt in enumerate(HOSTS[host].prompts):
        alone = drawn(host, name, prompt, seed=11 + index).images
        assert torch.equal(alone[0], together[index])
        assert not torch.equal(alone[0], together[index - 1])


@every
def test_leaves_networks_and_global_randomness_alone(host: str, name: str) -> None:
    pipe = HOSTS[host].pipeline()
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    before: list[dict[str, Tensor]] = [
        {str(k): v.clone() for k, v in network.state_dict().items()} for network in networks
    ]
    attributes = [[set(vars(part)) for part in network.modules()] for network in networks]
    buffers = [[(k, v.clone()) for k, v in network.named_buffers()] for network in networks]
    torch.manual_seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    drawn(host, name, seed=1)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert [[set(vars(part)) for part in network.modules()] for network in networks] == attributes
    for network, old, owned in zip(networks, before, buffers, strict=True):
        assert all(torch.equal(old[str(k)], tensor) for k, tensor in network.state_dict().items())
        current = dict(network.named_buffers())
        assert all(torch.equal(v, current[k]) for k, v in owned)


@every
def test_static_shapes_equal_dynamic_ones(host: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiled network is given (fixed shapes, all slots) yields the same tokens as the eager path."""
    pipe: Any = HOSTS[host].pipeline()
    expected, lengths = drawn(host, name, seed=2).images, set()

    def watched(x: Tensor, attention: Any) -> Tensor:
        lengths.add(attention.length)
        return pipe.transformer.transform(x, attention)

    monkeypatch.setattr(
        pipe,
        "_transforms",
        lambda network: watched if network is pipe.transformer else network.transform,
    )
    assert torch.equal(drawn(host, name, seed=2).images, expected)
    assert lengths == {None}


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_a_pass_is_one_graph(host: str) -> None:
    """`pipe.compile()`: no break in the decoder of transformers, and the same images."""
    pipe: Any = HOSTS[host].pipeline()
    expected = drawn(host, "jacobi", seed=2).images
    pipe.compile(backend="eager")
    try:
        assert torch.equal(drawn(host, "jacobi", seed=2).images, expected)
    finally:
        pipe.uncompile()
