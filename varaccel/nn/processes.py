"""Processes that hold one network together, a part of each of its layers (tensor parallelism)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch.distributed
from torch import Tensor, nn

ValueT = TypeVar("ValueT")


class HasWeights(Protocol):
    """A network, as far as it matters here."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


def is_first_process() -> bool:
    """Whether this process speaks and writes for all that `torchrun` started; True where it started none."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """How many processes work together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave_processes() -> None:
    """End what the processes have in common, if they have anything."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def num_parts(weight: Tensor) -> int:
    """Among how many processes the rows of a weight are shared out; 1 for one that this process holds whole."""
    local = getattr(weight, "to_local", None)
    return 1 if local is None else weight.shape[0] // local().shape[0]


def is_split(network: HasWeights) -> bool:
    """Whether several processes hold the network together."""
    return _split_weight(network) is not None


def said_first(network: HasWeights, value: ValueT) -> ValueT:
    """The `value` of the first of the processes that hold a network together; all of them must call this."""
    weight = _split_weight(network)
    if weight is None:
        return value
    mesh, said = weight.device_mesh, [value]
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        torch.distributed.broadcast_object_list(
            said,
            src=torch.distributed.get_global_rank(group, 0),
            group=group,
            device=weight.to_local().device,
        )
    return said[0]


def _split_weight(network: HasWeights) -> Any:
    return next((weight for weight in network.parameters() if hasattr(weight, "device_mesh")), None)
