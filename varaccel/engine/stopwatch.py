"""Time by phase."""

from __future__ import annotations

import time

import torch

from varaccel.nn.devices import wait_for


class Stopwatch:
    """Wall-clock time by phase; waits for the device at the borders of phases only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name] = now - self._last
        self._last = now

    def _now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()
