"""Number types of networks."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network's floating-point weights in place, but for the parts that it keeps in float32.

    `Module.to` would convert these as well; diffusers leaves them alone only while it loads.
    """
    kept = tuple(f"{name}." for name in getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if tensor.is_floating_point() and not name.startswith(kept):
            tensor.data = tensor.data.to(dtype)
