"""Rotary position embedding (RoPE: arXiv 2104.09864): along a line, and on a grid as in LlamaGen, section 3.1."""

from __future__ import annotations

import torch
from torch import Tensor

from varaccel.nn.devices import HOST, is_host


def rotary_table(
    grid_size: int,
    head_dim: int,
    prefix: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    prefix_identity: bool = False,
) -> Tensor:
    """Cosines and sines for `prefix` condition slots followed by a square grid in raster order.

    The first half of the channel pairs turns with the row, the second half with the column. Condition slots
    are *zero* in published LlamaGen, not the identity: their rotated queries and keys vanish, so every query
    scores exactly 0 against a condition key and only the value path carries the condition. An image token then
    reads the mean of the caption's slots and cannot choose among its words.

    Args:
        prefix_identity: leave queries and keys of condition slots as they are, so that words can be chosen.

    Returns:
        [prefix + grid_size ** 2, head_dim / 2, 2] float32: (cos, sin) of the angle of each channel pair.
    """
    places = torch.arange(grid_size, dtype=torch.float32, device=HOST)
    table = grid_rotary_table(
        places.repeat_interleave(grid_size), places.repeat(grid_size), head_dim, base=base
    )
    slots = table.new_zeros(prefix, *table.shape[1:])
    if prefix_identity:
        slots[..., 0] = 1.0
    return torch.cat([slots, table]).to(device)


def grid_rotary_table(rows: Tensor, columns: Tensor, head_dim: int, *, base: float = 10000.0) -> Tensor:
    """Cosines and sines of P places of a plane, wherever these are.

    The first half of the channel pairs turns with the row, the second half with the column.

    Args:
        rows, columns: [P] float32, where the places are; need not be whole numbers.
        head_dim: a multiple of 4.

    Returns:
        [P, head_dim / 2, 2] float32: (cos, sin) of the angle of each channel pair.
    """
    frequencies = base ** (
        -torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=rows.device) / (head_dim // 2)
    )  # [head_dim / 4]
    angles = torch.cat([torch.outer(rows, frequencies), torch.outer(columns, frequencies)], dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def line_rotary_table(
    length: int,
    head_dim: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cosines and sines of places 0 to `length` - 1 in a row.

    Returns:
        [length, head_dim / 2, 2] float32: (cos, sin) of the angle of each channel pair.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=HOST) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=HOST), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate interleaved channel pairs in float32 and cast back.

    Args:
        x: [B, H, P, D].
        rotary: [P, D / 2, 2] shared by the batch, or [B, P, D / 2, 2] with one position list per row.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, H, P, D / 2, 2]
    if rotary.dim() == 4:
        rotary = rotary.unsqueeze(1)
    if is_host(x.device) and not torch.compiler.is_compiling() and rotary.dtype == pairs.dtype:
        # the same products in a third of the time of a short pass; compilers leave complex numbers alone
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotary)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = rotary.unbind(-1)
    a, b = pairs.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
