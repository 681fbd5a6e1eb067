"""Networks are in eval mode while somebody reads them, and as they were afterwards."""

from __future__ import annotations

import threading

import pytest
from torch import nn

from varaccel.nn.eval_mode import eval_mode


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


def mixed() -> nn.Module:
    """A network in training whose first layer is frozen in eval mode, as a fine-tuning leaves it."""
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    network.train()
    network[0].eval()
    return network


def test_each_module_gets_its_own_mode_back() -> None:
    network, other = mixed(), nn.Linear(1, 1).eval()
    before = modes(network)
    with eval_mode([network, other, network]):
        assert not any(modes(network))
    assert modes(network) == before
    assert not other.training


def test_after_an_error() -> None:
    network = mixed()
    before = modes(network)
    with pytest.raises(ZeroDivisionError), eval_mode([network]):
        raise ZeroDivisionError
    assert modes(network) == before


def test_the_last_of_several_threads_restores() -> None:
    """Whoever ends first leaves the network in eval mode for the others, and the mode found first is the one."""
    network = mixed()
    before, inside, leave = modes(network), threading.Event(), threading.Event()

    def read() -> None:
        with eval_mode([network]):
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=read)
    with eval_mode([network]):
        other.start()
        assert inside.wait(10)
    assert not any(modes(network)), "the other thread still reads it"
    leave.set()
    other.join()
    assert modes(network) == before
