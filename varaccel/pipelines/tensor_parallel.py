"""Loading one model of transformers into several processes, which hold a part of every layer each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from varaccel.engine.options import positive_integer
from varaccel.errors import InputError
from varaccel.nn.processes import num_processes

OPTIONS = ("tp_size", "tp_plan", "distributed_config")
"""What asks for several processes."""

LLAMA_RULES = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
"""How a layer built as Llama's is shared out; for models that transformers has no rules for."""


def shared_out(folder: Path, options: Mapping[str, Any], rules: Mapping[str, str] | None) -> dict[str, Any]:
    """Options for `PreTrainedModel.from_pretrained` with those in `OPTIONS` as one `DistributedConfig`.

    Args:
        folder: of the model.
        options: as they were typed.
        rules: by the names of parts of the model, where transformers has none for it; None for a model that
            cannot be shared out.

    Raises:
        InputError: a number of processes that does not divide the heads, or that are not there; options that say the
            same twice; a version of transformers that cannot do it.
    """
    left = {name: value for name, value in options.items() if name not in OPTIONS}
    asked = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    if not asked:
        return left
    config = _distributed_config(asked, rules or {})
    size = int(config.tp_size)
    if size == 1 and "distributed_config" not in asked:
        return left
    if size > 1:
        if rules is None:
            raise InputError(
                "there are no rules for sharing out this model among processes; leave tp_size out."
            )
        _check_heads(folder, size)
        there = num_processes()
        if there % size:
            raise InputError(
                f"tp_size={size} needs {size} processes, and {'this is one' if there == 1 else f'there are {there}'}; "
                f"start them with torchrun --nproc-per-node {size}."
            )
        if options.get("device_map") is not None:
            raise InputError("with tp_size every process has a device of its own; leave device_map out.")
    return {**left, "distributed_config": config}


def _distributed_config(asked: Mapping[str, Any], rules: Mapping[str, str]) -> Any:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        DistributedConfig = None
    if DistributedConfig is None or "tp_size" not in inspect.signature(DistributedConfig).parameters:
        raise InputError("several processes for one model need a newer transformers; 5.24 is known to do it.")
    if "distributed_config" in asked:
        if len(asked) > 1:
            raise InputError(
                "distributed_config says how many processes there are; leave tp_size and tp_plan out."
            )
        config = asked["distributed_config"]
        config = DistributedConfig.from_dict(config) if isinstance(config, Mapping) else config
    else:
        size = asked.get("tp_size")
        config = DistributedConfig(
            tp_size=None if size is None else positive_integer("tp_size", size), tp_plan=asked.get("tp_plan")
        )
    if config.tp_plan in (None, "auto") and rules and config.tp_size > 1:
        config.tp_plan = dict(rules)
    return config


def _check_heads(folder: Path, size: int) -> None:
    """Refuse, before weights are read, a number of processes that cannot have as many heads each."""
    text = AutoConfig.from_pretrained(folder).get_text_config()
    heads = text.num_attention_heads
    kinds = {"heads": heads, "heads of keys and values": getattr(text, "num_key_value_heads", None) or heads}
    for kind, count in kinds.items():
        if count % size:
            fitting = ", ".join(
                str(n) for n in range(1, min(kinds.values()) + 1) if not any(c % n for c in kinds.values())
            )
            raise InputError(
                f"the model has {count} {kind}, which {size} processes cannot share out evenly; choose tp_size from "
                f"{fitting}."
            )
