"""A decoder with some of its layers, or with other attention, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from varaccel.models.transformers_host.offloading import HOOK_NAMES

_MOST_SLOTS = 2**20
"""Of a cache."""


def with_layers(decoder: nn.Module, name: str, layers: Sequence[nn.Module]) -> nn.Module:
    """A second decoder that runs `layers` in the place of its own; it shares every weight with the first.

    Args:
        name: of the list of layers in the decoder.
    """
    return _with_parts(decoder, {name: nn.ModuleList(layers)})


def with_attention(layer: nn.Module, implementation: str) -> nn.Module:
    """A second layer whose attention looks up another function in transformers' table."""
    attention: Any = layer.self_attn
    second: Any = _with_parts(attention, {})
    second.config = copy.copy(attention.config)
    # the public setter also writes to the configurations of parts, which the copy shares
    second.config._attn_implementation_internal = implementation
    return _with_parts(layer, {"self_attn": second})


def with_open_triangle(layer: nn.Module) -> nn.Module:
    """A second layer of the GPT-2 kind, whose attention sees whatever its mask lets it see.

    Its own lets a query see the slots before it only, from a triangle in a buffer; drafts do not stand in that order.
    """
    attention: Any = layer.attn
    with torch.inference_mode(False):  # outlives the call, which may run in that mode
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=attention.bias.device)
    second = _with_parts(attention, {})
    # of any size, without the memory of it
    vars(second)["_buffers"] = {
        **attention._buffers,
        "bias": everything.expand(1, 1, _MOST_SLOTS, _MOST_SLOTS),
    }
    return _with_parts(layer, {"attn": second})


def _with_parts(module: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """A module with the same entries as another, and some submodules of its own."""
    second: Any = object.__new__(type(module))
    vars(second).update({key: value for key, value in vars(module).items() if key not in HOOK_NAMES})
    vars(second)["_modules"] = {**module._modules, **parts} if parts else module._modules
    return second
