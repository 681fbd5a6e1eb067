"""Number types of training."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

from varaccel.nn.devices import is_gpu, is_host

_ROWS, _INNER, _COLUMNS, _REPEATS = 512, 384, 1536, 5


def quick_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes matrix products in bfloat16 faster than in float32.

    CPUs differ tenfold in both directions: some have AMX tiles, some only AVX-512 instructions for bfloat16, and others
    emulate it. So a CPU is measured, once per process and within milliseconds.
    """
    if is_gpu(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not is_host(device) or _quick_on_this_cpu()


def autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Matrix products and convolutions in bfloat16 if that is `wanted` and quick on `device`, else as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and quick_bfloat16(device))


@cache
def _quick_on_this_cpu() -> bool:
    return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """The quickest of a few products of a feed-forward layer's size: other work on the machine only ever adds time."""
    inputs, weight = torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_INNER, _COLUMNS, dtype=dtype)

    def seconds(result: Tensor) -> float:
        start = time.perf_counter()
        torch.mm(inputs, weight, out=result)
        return time.perf_counter() - start

    result = torch.empty(_ROWS, _COLUMNS, dtype=dtype)
    return min(seconds(result) for _ in range(_REPEATS))
