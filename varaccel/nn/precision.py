"""Number types of networks."""

from __future__ import annotations

from itertools import chain
from typing import Any, Self

import torch
from torch import nn

from varaccel.errors import unknown_name

_SHORT_NAMES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
}
_NAMES = ("float16", "bfloat16", "float32", "float64")


def is_dtype_name(text: str) -> bool:
    """Whether a text is the name of a floating-point number type."""
    return text.removeprefix("torch.").lower() in {*_NAMES, *_SHORT_NAMES}


def as_dtype(value: Any) -> torch.dtype:
    """A floating-point number type, or the one of that name: "float16", "torch.bfloat16", "fp16".

    Raises:
        InputError: there is none of the name, or it is no floating-point type.
    """
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return value
    name = str(value).removeprefix("torch.").lower()
    name = _SHORT_NAMES.get(name, name)
    if name not in _NAMES:
        raise unknown_name("dtype", str(value), _NAMES)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class KeepsFloat32:
    """In front of `nn.Module`: a network whose `_keep_in_fp32_modules` stay in float32 however it is converted.

    diffusers leaves these alone only while it loads; `pipe.to(torch.bfloat16)` and `network.half()` would not.
    """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `nn.Module.to`."""
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            cast(self, dtype)  # type: ignore[arg-type]
        if device is None and memory_format is None:
            return self
        options = {} if memory_format is None else {"memory_format": memory_format}
        return super().to(device=device, non_blocking=non_blocking, **options)  # type: ignore[misc]

    def half(self) -> Self:
        """As `nn.Module.half`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """As `nn.Module.bfloat16`."""
        return self.to(torch.bfloat16)

    def double(self) -> Self:
        """As `nn.Module.double`."""
        return self.to(torch.float64)


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network's floating-point weights in place, but for the parts that it keeps in float32.

    See `KeepsFloat32`.
    """
    kept = tuple(f"{name}." for name in getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if tensor.is_floating_point() and not name.startswith(kept):
            tensor.data = tensor.data.to(dtype)
