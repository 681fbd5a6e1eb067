"""The most memory that a block of code took at one time."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from varaccel.nn.devices import is_gpu

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what the kernel takes as "the peak is what is resident now"


class PeakMemory:
    """Measures the peak of a `with` block; blocks must not be nested, since the device has one high-water mark.

    On a GPU it is the peak of what torch has allocated there. On the CPU it is the resident memory of the whole
    process, weights, libraries and other threads included: to be compared with the same figure of another block, not
    to be read as what the block needed. Memory that an allocator kept from before the block counts as well.

    Args:
        device: where the block works.

    Attributes:
        bytes: the peak after the block, None where the system does not tell it (CPU other than Linux).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._known = False

    def __enter__(self) -> Self:
        self.bytes = None
        if is_gpu(self.device):
            torch.cuda.synchronize(self.device)  # what still runs from before may free memory
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._known = False
        with contextlib.suppress(OSError):
            _RESET.write_text(_RESET_PEAK)
            self._known = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if is_gpu(self.device):
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._known:
            self.bytes = _resident_peak()


def _resident_peak() -> int | None:
    """The high-water mark of resident memory in bytes."""
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # "kB" of the kernel are 1024 bytes
    return None
