"""Names of convolutional image tokenizers whose published files count the levels of encoder and decoder.

Such files (VQGAN, arXiv 2012.09841, and its many heirs) have `encoder.down.{level}` and `decoder.up.{level}`, both
counted from full resolution. The networks are those of `varaccel.tokenizers.blocks`, whose decoder counts from the
lowest one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def network_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of encoder and decoder as the models' constructors name them.

    Raises:
        KeyError: a tensor that is not there.
    """
    base = state["encoder.conv_in.weight"].shape[0]
    levels = count(state, r"encoder\.down\.(\d+)\.block\.0\.norm1\.weight")
    count(state, r"decoder\.up\.(\d+)\.block\.0\.norm1\.weight")
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": count(state, r"encoder\.down\.0\.block\.(\d+)\.norm1\.weight"),
    }


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are whose names match a pattern with one group, their number.

    Raises:
        KeyError: none.
    """
    found = {int(match[1]) for key in state if (match := re.fullmatch(pattern, key))}
    if not found:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return 1 + max(found)


def block_name(name: str, levels: int, *, attention: bool) -> str:
    """The name of a published tensor in `blocks.Encoder` and `blocks.Decoder`.

    Args:
        levels: of the decoder.
        attention: whether attention stands between the two blocks in the middle.
    """
    name = name.replace("mid.block_1.", "mid.0.").replace("mid.attn_1.", "mid.1.")
    name = name.replace("mid.block_2.", "mid.2." if attention else "mid.1.")
    name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.conv_blocks.\1.res.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", name)
    if match := re.match(r"decoder\.up\.(\d+)\.", name):
        rest = name[match.end() :].replace("block.", "res.", 1)
        name = f"decoder.conv_blocks.{levels - 1 - int(match[1])}.{rest}"
    return name
