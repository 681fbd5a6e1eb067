"""What machine a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from varaccel.nn.devices import is_gpu


def describe_machine(device: torch.device) -> str:
    """Processor or GPU, number of threads, and the versions of Python and torch."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if is_gpu(device):
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
