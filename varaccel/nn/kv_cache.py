"""Keys and values of what a network has already read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Static key and value buffers, `keys` and `values` [L, B, H, S, D], zero where nothing was written.

    A write overwrites the named slots; there is no length to rewind, so taking a draft token back is writing over
    it. Which slots may be looked at is the caller's mask.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, batch, heads, slots, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def batch(self) -> int:
        """Number of rows B."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """Number of slots S."""
        return self.keys.shape[3]

    @property
    def device(self) -> torch.device:
        """Where slots and masks are kept."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def update(
        self, layer: int, slots: Tensor, keys: Tensor, values: Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, then return what is there.

        Args:
            slots: [P] shared by the batch, or [B, P] with one list per row.
            keys, values: [B, H, P, D]; fewer rows than the cache holds address its first rows.
            length: return only the first `length` slots (known on the host, so no synchronisation).

        Returns:
            keys and values, [B, H, length, D] each, as views; converted if the cache has another number type.
        """
        rows = keys.shape[0]
        all_keys, all_values = self.keys[layer, :rows], self.values[layer, :rows]
        if slots.dim() == 1:
            all_keys.index_copy_(2, slots, keys.to(all_keys.dtype))
            all_values.index_copy_(2, slots, values.to(all_values.dtype))
        else:
            batch = torch.arange(rows, device=slots.device).unsqueeze(1)
            all_keys[batch, :, slots] = keys.transpose(1, 2).to(all_keys.dtype)
            all_values[batch, :, slots] = values.transpose(1, 2).to(all_values.dtype)
        return all_keys[:, :, :length].to(keys.dtype), all_values[:, :, :length].to(values.dtype)

    def beside(self, layer: int, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """One layer's first `length` slots followed by new keys and values [B, H, P, D], which are not stored.

        Returns:
            keys and values, [B, H, length + P, D] each.
        """
        rows = keys.shape[0]
        old_keys = self.keys[layer, :rows, :, :length].to(keys.dtype)
        old_values = self.values[layer, :rows, :, :length].to(values.dtype)
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)

    def put_rows(self, rows: Tensor, other: KVCache, length: int) -> None:
        """The first `length` slots of rows `rows` [n] become those of `other`, in order; the rest stays."""
        self.keys[:, rows, :, :length] = other.keys[:, :, :, :length]
        self.values[:, rows, :, :length] = other.values[:, :, :, :length]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Only rows `rows`, which must ascend, stay. They move within the memory that there is, which stays as it is:
        a smaller copy would need more than the call had so far."""
        for target, source in enumerate(rows):
            if target != source:
                self.keys[:, target] = self.keys[:, source]
                self.values[:, target] = self.values[:, source]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy keys and values of all layers from slots `source` [B, M] to slots `target` [B, M]."""
        rows = torch.arange(source.shape[0], device=source.device).unsqueeze(1)
        for buffer in (self.keys, self.values):
            by_slot = buffer.permute(1, 3, 0, 2, 4)  # [B, S, L, H, D], a view
            by_slot[rows, target] = by_slot[rows, source]
