"""What the engine asks of every network, and whether one can take the place of another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import nn

from varaccel.errors import InputError
from varaccel.nn.signature import Signature


@runtime_checkable
class Network(Protocol):
    """A network in eval mode. A call reads it and never changes it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def signature(self) -> Signature:
        """What the network reads and predicts."""
        ...


NetworkT = TypeVar("NetworkT", bound=Network)


def check_substitute(network: object, host: NetworkT, role: str) -> NetworkT:
    """`network` as one that can take the place of `host`: any network of the same signature on the same device.

    Args:
        role: what it is for, in messages, such as "drafter".

    Raises:
        InputError: no network with a signature, another signature, or another device.
    """
    if not isinstance(network, Network):
        raise InputError(
            f"a {role} is a network with the model's signature(), or a pipeline that has one, "
            f"got {type(network).__name__}."
        )
    if differences := host.signature().differences(network.signature()):
        raise InputError(
            f"the {role} does not fit the model: {', '.join(differences)}; use one for the same image tokenizer "
            "and the same conditions."
        )
    if network.device != host.device:
        raise InputError(
            f"the {role} is on {network.device}, the model on {host.device}; move it there with .to()."
        )
    return cast("NetworkT", network)  # the signature says what no type can
