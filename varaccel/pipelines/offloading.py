"""Which components are on the device, where model offloading moves each there for its turn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.hooks import CpuOffload
from torch import nn


def bring(wanted: Iterable[object], others: Iterable[object] = ()) -> None:
    """Have the components that run next on the device together, and the others on the CPU.

    The hooks of `enable_model_cpu_offload` wait for `forward`, and pipelines call other methods too. Networks without
    such a hook stay where they are.

    Args:
        wanted: components, or None for one that there is not.
        others: further components; those that are wanted too are not moved away.
    """
    hooks = _hooks_of(wanted)
    for part, hook in _hooks_of(others).items():
        if part not in hooks:
            hook.init_hook(part)
    for part, hook in hooks.items():
        before = hook.prev_module_hook
        if before is not None and before.model in hooks:
            hook.prev_module_hook = None  # it would send away what is wanted as well
        try:
            hook.pre_forward(part)
        finally:
            hook.prev_module_hook = before


def _hooks_of(parts: Iterable[object]) -> dict[nn.Module, Any]:
    """The components that model offloading moves as a whole, and what moves them."""
    found = {}
    for part in parts:
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # accelerate keeps several in one
            if isinstance(part, nn.Module) and isinstance(each, CpuOffload):
                found[part] = each
    return found
