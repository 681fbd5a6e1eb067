"""Keys and values of a network whose layers lie on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varaccel.nn.kv_cache import KVCache


class SpreadCache(KVCache):
    """A cache of one part per device, so that a layer finds its keys and values where its weights are.

    It is written and read as any other; slots may come from any device.

    Args:
        devices: of the layers, one each.
        home: where slots and masks are kept.
        batch, heads, slots, head_dim, dtype: as of `KVCache`.
    """

    def __init__(
        self,
        *,
        devices: Sequence[torch.device],
        home: torch.device,
        batch: int,
        heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self._home, self._batch, self._slots = home, batch, slots
        self.parts = {
            device: KVCache(
                layers=devices.count(device),
                batch=batch,
                heads=heads,
                slots=slots,
                head_dim=head_dim,
                dtype=dtype,
                device=device,
            )
            for device in dict.fromkeys(devices)
        }
        self._places = [(device, devices[:layer].count(device)) for layer, device in enumerate(devices)]

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def device(self) -> torch.device:
        return self._home

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def update(
        self, layer: int, slots: Tensor, keys: Tensor, values: Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        device, index = self._places[layer]
        return self.parts[device].update(index, slots.to(device), keys, values, length)

    def beside(self, layer: int, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        device, index = self._places[layer]
        return self.parts[device].beside(index, keys, values, length)

    def put_rows(self, rows: Tensor, other: KVCache, length: int) -> None:
        assert isinstance(other, SpreadCache)
        for device, part in self.parts.items():
            part.put_rows(rows.to(device), other.parts[device], length)

    def keep_rows(self, rows: Sequence[int]) -> None:
        for part in self.parts.values():
            part.keep_rows(rows)
        self._batch = len(rows)

    def move(self, source: Tensor, target: Tensor) -> None:
        for device, part in self.parts.items():
            part.move(source.to(device), target.to(device))
