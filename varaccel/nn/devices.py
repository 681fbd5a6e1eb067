"""What devices can do: the one place where their kinds are told apart."""

from __future__ import annotations

import torch
from torch import Tensor

Device = torch.device | str

HOST = "cpu"
GPU = "cuda"
KNOWN = (HOST, GPU, "mps", "xpu")
"""The kinds of devices that are asked for by name, whether this machine has them or not."""


def is_host(device: Device) -> bool:
    """Whether work is done when a call returns, so that looking at a result waits for nothing."""
    return torch.device(device).type == HOST


def lies_on_host(tensor: Tensor) -> bool:
    """`is_host` of a tensor's device, in a tenth of the time: for what is asked in every layer of every pass."""
    return tensor.is_cpu


def is_gpu(device: Device) -> bool:
    """Whether CUDA graphs can be recorded, memory counted and streams used."""
    return torch.device(device).type == GPU


def has_gpu() -> bool:
    """Whether this machine has a GPU for CUDA."""
    return torch.cuda.is_available()


def is_available(device: Device) -> bool:
    """Whether this machine has the device."""
    place = torch.device(device)
    if place.type == HOST:
        return True
    found = torch.accelerator.current_accelerator(check_available=True)
    return (
        found is not None
        and found.type == place.type
        and (place.index or 0) < torch.accelerator.device_count()
    )


def wait_for(device: Device) -> None:
    """Wait until the device has done what it was given."""
    if not is_host(device) and torch.accelerator.is_available():
        torch.accelerator.synchronize(torch.device(device))


def has_float64(device: Device) -> bool:
    """Whether the device computes in float64: Apple's GPUs do not, some of Intel's neither."""
    place = torch.device(device)
    if place.type == "xpu":
        return bool(getattr(torch.xpu.get_device_properties(place), "has_fp64", True))
    return place.type != "mps"


def real_type(device: Device) -> torch.dtype:
    """The number type that draws and densities are compared in: float64, float32 where there is none.

    In float32 a token less likely than about 1e-7 may be lost, and a draft token whose ratio is as near to its random
    number may be kept or refused.
    """
    return torch.float64 if has_float64(device) else torch.float32
