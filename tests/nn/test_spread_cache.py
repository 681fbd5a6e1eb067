"""A cache whose layers lie on several devices holds what one tensor would hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from varaccel.nn.kv_cache import KVCache
from varaccel.nn.spread_cache import SpreadCache

HERE, THERE = torch.device("cpu"), torch.device("cpu:0")
"""One device by two names: the parts are two, and the numbers can be looked at."""
SIZES = {"batch": 3, "heads": 2, "slots": 6, "head_dim": 4, "dtype": torch.float32}
DEVICES = (HERE, THERE, HERE, THERE, THERE)


def both() -> tuple[KVCache, SpreadCache]:
    whole = KVCache(layers=len(DEVICES), device=HERE, **SIZES)
    return whole, SpreadCache(devices=DEVICES, home=HERE, **SIZES)


def equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def test_it_is_one_cache_for_who_uses_it() -> None:
    whole, spread = both()
    assert len(spread.parts) == 2
    assert (spread.batch, spread.slots, spread.device, spread.nbytes) == (3, 6, HERE, whole.nbytes)
    generator = torch.Generator().manual_seed(0)
    for layer in range(len(DEVICES)):
        keys, values = torch.randn(2, 3, 2, 2, 4, generator=generator)
        slots = torch.tensor([[0, 3], [1, 4], [2, 5]]) if layer % 2 else torch.tensor([layer % 4, 5])
        assert equal(
            spread.update(layer, slots, keys, values, 5), whole.update(layer, slots, keys, values, 5)
        )
        more = torch.randn(2, 3, 2, 1, 4, generator=generator)
        assert equal(spread.beside(layer, *more, length=4), whole.beside(layer, *more, length=4))
    source, target = torch.tensor([[5], [0], [4]]), torch.tensor([[1], [2], [3]])
    spread.move(source, target)
    whole.move(source, target)
    nothing = torch.zeros(3, 2, 0, 4)
    none = torch.zeros(0, dtype=torch.int64)
    for layer in range(len(DEVICES)):
        assert equal(
            spread.update(layer, none, nothing, nothing), whole.update(layer, none, nothing, nothing)
        )


def test_every_layer_stays_on_its_device() -> None:
    """Devices that this machine has not, in a mode that computes no numbers but refuses to mix them."""
    devices = [torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:0")]
    with FakeTensorMode():
        spread = SpreadCache(devices=devices, home=devices[0], **SIZES)
        slots = torch.tensor([[0], [1], [2]], device="cuda:0")
        for layer, device in enumerate(devices):
            keys = torch.zeros(3, 2, 1, 4, device=device)
            assert {x.device for x in spread.update(layer, slots, keys, keys)} == {device}
        spread.move(slots, slots + 1)
        whole = KVCache(layers=3, device=devices[0], **SIZES)
        with pytest.raises(RuntimeError, match="same device"):
            whole.update(1, slots[0], *torch.zeros(2, 3, 2, 1, 4, device=devices[1]))
