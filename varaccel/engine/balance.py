"""How many tokens a device reads in the time of one: its arithmetic rate over its memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from varaccel.nn.devices import is_host, wait_for

_ROUNDS = 3


@dataclass(frozen=True)
class Balance:
    """What a device does per second with matrices of a type.

    Attributes:
        rate: multiply-adds per second in matrix products, times 2.
        bandwidth: bytes per second that a matrix-vector product reads its matrix with.
        itemsize: bytes per number.
    """

    rate: float
    bandwidth: float
    itemsize: int


@lru_cache(maxsize=8)
def measure_balance(device: torch.device, dtype: torch.dtype) -> Balance:
    """Measure a device: well under a second, once per process, device and type.

    The matrices have the size of a layer, and together exceed the caches of a processor.
    """
    host = is_host(device)
    width, layers = (1024, 24) if host else (2048, 16)
    weights = [torch.full((width, width), 1e-3, dtype=dtype, device=device) for _ in range(layers)]
    # far more rows than can be free, so that arithmetic alone decides
    many = torch.ones(128 if host else 2048, width, dtype=dtype, device=device)
    one = torch.ones(1, width, dtype=dtype, device=device)

    def product(rows: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for weight in weights:
                torch.nn.functional.linear(rows, weight)

        return run

    seconds = {name: best_seconds(product(rows), device) for name, rows in (("many", many), ("one", one))}
    size = sum(weight.numel() for weight in weights)
    itemsize = weights[0].element_size()
    return Balance(2 * size * len(many) / seconds["many"], size * itemsize / seconds["one"], itemsize)


def best_seconds(run: Callable[[], object], device: torch.device, rounds: int = _ROUNDS) -> float:
    """Seconds that `run` takes: the best of `rounds` after one to warm up, which leaves out what disturbed."""
    best = float("inf")
    for _ in range(rounds + 1):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best
