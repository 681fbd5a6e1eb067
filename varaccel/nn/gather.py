"""Picking entries of sequences."""

from __future__ import annotations

from torch import Tensor


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Entries `index` [R, A] of x [R, P, ...]: [R, A, ...]; -1, which is padding, picks the first."""
    wide = index.clamp(min=0).view(*index.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, wide.expand(-1, -1, *x.shape[2:]))
