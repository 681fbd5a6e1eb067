"""Packed weights: the same products, no change overlooked, networks as they were."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.nn import packed_weights as module_under_test
from varaccel.nn.packed_weights import (
    MAX_ROWS,
    bytes_read,
    packed_weights,
    round_to_float16,
    usual_products,
)

pytestmark = pytest.mark.skipif(
    not module_under_test._on_processor(), reason="packed weights are for x86 processors"
)


def linear(outputs: int = 192, inputs: int = 160, *, bias: bool = True, half: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    if half:
        with torch.no_grad():
            layer.weight.copy_(layer.weight.half())
    return layer


@torch.inference_mode()
def run(layer: nn.Module, x: Tensor) -> Tensor:
    with packed_weights([layer]):
        return layer(x)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were packed."""
    seen: list[Tensor] = []
    pack = module_under_test._pack

    def noted(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        seen.append(weight)
        return pack(weight, bias)

    monkeypatch.setattr(module_under_test, "_pack", noted)
    return seen


@pytest.mark.parametrize("half", [True, False], ids=["float16 numbers", "float32 numbers"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 160), (2, 1, 160), (3, 7, 160), (MAX_ROWS, 160), (2, 3, 4, 160)])
def test_products_are_those_of_the_layer(
    half: bool, bias: bool, shape: tuple[int, ...], packings: list[Tensor]
) -> None:
    layer = linear(bias=bias, half=half)
    x = torch.randn(shape)
    expected = F.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    found = run(layer, x)
    assert packings
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [True, False])
def test_rows_of_a_transposed_input(half: bool) -> None:
    layer = linear(half=half)
    x = torch.randn(160, 5).t()
    torch.testing.assert_close(run(layer, x), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_every_float16_number_comes_through_exactly() -> None:
    numbers = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16).float()
    numbers = numbers[numbers.isfinite()]
    size = 248
    rows = len(numbers) // size
    layer = nn.Linear(size, rows, bias=False)
    with torch.no_grad():
        layer.weight.copy_(numbers[: rows * size].view(rows, size))
    found = torch.cat([run(layer, part) for part in torch.eye(size).split(MAX_ROWS)])
    assert torch.equal(found.t(), layer.weight)


@pytest.mark.parametrize("largest", [70000.0, 1e-9])
def test_numbers_beyond_float16_are_kept_in_float32(largest: float) -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[3, 5] = largest
    x = torch.zeros(1, 160)
    x[0, 5] = 1
    assert run(layer, x)[0, 3] == pytest.approx(largest + float(layer.bias[3].detach()), rel=1e-6)
    assert bytes_read(layer.weight, 2) == layer.weight.nbytes


def test_many_rows_and_none_are_the_layers_own(packings: list[Tensor]) -> None:
    layer = linear()
    for rows in (MAX_ROWS + 1, 500, 0):
        x = torch.randn(rows, 160)
        assert torch.equal(run(layer, x), layer(x))
    assert not packings


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda layer: layer.weight.mul_(1.5),
    "through data": lambda layer: layer.weight.data.mul_(1.5),
    "the smallest step of one number": lambda layer: layer.weight.data.view(torch.int32)[7, 9].add_(1),
    "numbers that changed places": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(1)),
    "rows that changed places": lambda layer: layer.weight.data.copy_(layer.weight.data.roll(1, 0)),
    "other numbers": lambda layer: setattr(layer.weight, "data", torch.randn(192, 160)),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(192, 160))),
    "loaded": lambda layer: layer.load_state_dict(linear(half=False).state_dict()),
    "bias": lambda layer: layer.bias.data.add_(1),
}


@torch.no_grad()
def seen(change: Callable[[nn.Linear], object]) -> bool:
    """Whether what a layer gives after a change is that of the changed weights."""
    layer = linear()
    x = torch.zeros(2, 160)
    x[0, 9], x[1] = 1, torch.randn(160, generator=torch.Generator().manual_seed(1))
    before = run(layer, x)
    change(layer)
    found = run(layer, x)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    same = torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    return same and not torch.equal(found, before)


@pytest.mark.parametrize("change", list(CHANGES))
def test_no_change_of_the_weights_is_overlooked(change: str) -> None:
    assert seen(CHANGES[change])


def test_a_change_that_was_overlooked_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test._Fingerprint, "__eq__", lambda self, other: other is not None)
    assert not any(seen(CHANGES[name]) for name in ("in place", "through data"))


def test_weights_are_packed_once(packings: list[Tensor]) -> None:
    layer = linear()
    for _ in range(3):
        run(layer, torch.randn(2, 160))
    assert len(packings) == 1


def test_networks_are_as_they_were() -> None:
    network = nn.Sequential(linear(), nn.SiLU(), linear(160, 192))
    before = copy.deepcopy(network.state_dict())
    with packed_weights([network, network]):
        assert "forward" in vars(network[0])
    with pytest.raises(ZeroDivisionError), packed_weights([network]):
        raise ZeroDivisionError
    assert not any("forward" in vars(m) for m in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert list(before) == list(network.state_dict())


def test_layers_that_are_not_usual_ones_are_left_alone(packings: list[Tensor]) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    hooked = linear()
    hooked.forward = lambda x: x[..., :1]  # type: ignore[method-assign]
    small, wide = nn.Linear(4, 4), linear().double()
    x = torch.randn(2, 160)
    with torch.inference_mode():
        assert torch.equal(run(Own(160, 192), x) * 0, torch.zeros(2, 192))
        assert torch.equal(run(hooked, x), x[..., :1])
        assert "forward" in vars(hooked)
        run(small, x[:, :4])
        run(wide, x.double())
        run(linear().bfloat16(), x.bfloat16())
        with usual_products():
            run(linear(), x)
    assert not packings


def test_gradients_are_those_of_the_layer(packings: list[Tensor]) -> None:
    layer = linear()
    with packed_weights([layer]):
        layer(torch.randn(2, 160)).sum().backward()
    assert layer.weight.grad is not None
    assert not packings


def test_networks_larger_than_their_share_of_memory_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, packings: list[Tensor]
) -> None:
    monkeypatch.setattr(module_under_test, "LARGEST_SHARE", 1e-9)
    run(linear(), torch.randn(2, 160))
    assert not packings


def test_blocks_of_several_threads() -> None:
    layer, x = linear(), torch.randn(2, 160)
    expected = run(layer, x)
    results: list[Tensor] = []

    def work() -> None:
        results.extend(run(layer, x) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    assert all(torch.equal(result, expected) for result in results)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.inference_mode()
def test_a_copy_made_meanwhile_has_weights_of_its_own(copied: Callable[[nn.Linear], nn.Linear]) -> None:
    layer, x = linear(), torch.randn(2, 160)
    with packed_weights([layer]):
        layer(x)
        other = copied(layer)
        other.weight.data.zero_()
        other.bias.data.zero_()
        assert not other(x).any()
        assert layer(x).any()


def test_packed_weights_go_with_their_layer() -> None:
    layer = linear()
    run(layer, torch.randn(2, 160))
    held = ref(module_under_test._LAYERS[layer])
    del layer
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("half", [True, False])
def test_one_graph_under_compile(half: bool, packings: list[Tensor]) -> None:
    network = nn.Sequential(linear(half=half), nn.SiLU(), linear(160, 192, half=half))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 160)
        with torch.inference_mode(), packed_weights([network]):
            torch.testing.assert_close(compiled(x), network(x))
        with torch.no_grad():
            network[0].weight.mul_(1.1)  # seen by compiled code as well
    assert len(packings) == 3


def test_bytes_that_a_product_reads() -> None:
    assert bytes_read(linear().weight, 2) == 192 * 160 * 2
    assert bytes_read(linear(half=False).weight, 2) == 192 * 160 * 4
    assert bytes_read(linear().weight, MAX_ROWS + 1) == 192 * 160 * 4
    assert bytes_read(nn.Linear(4, 4).weight, 1) == 64


def test_rounded_weights_are_those_of_float16() -> None:
    network = nn.Sequential(linear(half=False), linear(160, 192, half=False), nn.Linear(4, 4))
    with torch.no_grad():
        network[1].weight[0, 0] = 1e6
    before = copy.deepcopy(network)
    assert round_to_float16(network) == 2
    assert torch.equal(network[0].weight, before[0].weight.half().float())
    assert torch.equal(network[1].weight, before[1].weight), "numbers beyond float16 would be lost"
    assert bytes_read(network[0].weight, 2) == network[0].weight.nbytes // 2
