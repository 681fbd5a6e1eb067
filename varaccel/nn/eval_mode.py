"""Networks in eval mode while calls read them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class _Use:
    """How many blocks read a module, and the mode that it was found in."""

    blocks: int
    training: bool


_USES: dict[nn.Module, _Use] = {}
_LOCK = threading.Lock()


@contextmanager
def eval_mode(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Have networks in eval mode within the block, whatever `train()` left on, and as they were found after it.

    Where blocks of several threads overlap, a module gets its mode back when the last block that reads it ends.
    """
    modules = {module for network in networks for module in network.modules()}
    with _LOCK:
        for module in modules:
            _USES.setdefault(module, _Use(0, module.training)).blocks += 1
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                use = _USES[module]
                use.blocks -= 1
                if not use.blocks:
                    module.training = use.training
                    del _USES[module]
