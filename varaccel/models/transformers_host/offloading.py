"""What accelerate's hooks say of modules whose weights are moved while they run, or lie on several devices."""

from __future__ import annotations

import torch
from torch import nn

HOOK_NAMES = ("forward", "_old_forward", "_hf_hook")
"""Entries of a module that has a hook; they would run the module that they were made for."""


def is_hooked(module: nn.Module) -> bool:
    """Whether the module or a part of it has a hook."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the module runs; None if no hook says so."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # several hooks of one module stand in a list
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def running_device(module: nn.Module, default: torch.device) -> torch.device:
    """Where the module runs by its hooks, or else where its weights are; `default` if it has none."""
    found = execution_device(module)
    if found is None:
        weight = next(module.parameters(), None)
        found = default if weight is None else weight.device
    return found
