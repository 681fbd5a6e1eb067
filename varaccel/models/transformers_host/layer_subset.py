"""A decoder with some of its layers, on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_OFFLOADING = ("forward", "_old_forward", "_hf_hook")
"""What offloading leaves on a module; it would run the whole decoder."""


def with_layers(decoder: nn.Module, name: str, layers: Sequence[nn.Module]) -> nn.Module:
    """A second decoder that runs `layers` in the place of its own; it shares every weight with the first.

    Args:
        name: of the list of layers in the decoder.
    """
    part: Any = object.__new__(type(decoder))
    part.__dict__.update({key: value for key, value in vars(decoder).items() if key not in _OFFLOADING})
    part.__dict__["_modules"] = {**decoder._modules, name: nn.ModuleList(layers)}
    return part
