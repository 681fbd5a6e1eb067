"""Noticing numbers that are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from varaccel.errors import NumberError
from varaccel.nn.devices import is_host


class HasWeights(Protocol):
    """A network, as far as it is needed to name it."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


class NumberCheck:
    """Looks at what a network gives in every pass, for NaN and infinity.

    On the CPU the first pass that has any ends the call. On other devices nothing waits: what was seen stays there
    until `report`, and sampling must stand it until then.

    Args:
        source: what gives the numbers, for the message: a network's class.
        dtype: number type of its weights.
        device: of the numbers.
    """

    def __init__(self, source: str, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype = source, dtype
        self._waits = not is_host(device)
        self._first = torch.zeros((), dtype=torch.int32, device=device)  # the pass, 0 for none

    @classmethod
    def of(cls, network: HasWeights) -> NumberCheck:
        """For the outputs of a network: where it says that it computes, or where its weights are."""
        weights = next(network.parameters())
        # offloaded weights lie elsewhere, and quantised ones have integer types
        return cls(
            type(network).__name__,
            getattr(network, "dtype", weights.dtype),
            getattr(network, "device", weights.device),
        )

    def logits(self, logits: Tensor, number: int) -> None:
        """See the logits [..., V] of pass `number`: each row must have a largest; -inf is what is impossible."""
        self.values(logits.amax(dim=-1), number)

    def values(self, values: Tensor, number: int) -> None:
        """See numbers of pass `number`, all of which must be finite."""
        broken = ~values.isfinite().all()
        if self._waits:
            self._first = torch.where((self._first == 0) & broken, number, self._first)
        elif broken:
            raise self._error(number)

    def join(self, other: NumberCheck) -> None:
        """Tell also, when asked, what another check of the same network saw."""
        self._first = torch.where(self._first == 0, other._first, self._first)

    def report(self) -> None:
        """Tell what was seen; waits for the device.

        Raises:
            NumberError: NaN or infinity.
        """
        first = int(self._first)
        if first:
            raise self._error(first)

    def _error(self, number: int) -> NumberError:
        return not_finite(self.source, self.dtype, f" in pass {number}")


def check_finite(values: Tensor, source: object, dtype: torch.dtype, what: str) -> None:
    """Refuse what a network gave if any number of it is NaN or infinite; waits for the device.

    Args:
        source: the network.
        dtype: number type of its weights.
        what: it gave, such as "features of the prompt".

    Raises:
        NumberError: there is such a number.
    """
    if not bool(values.isfinite().all()):
        raise not_finite(type(source).__name__, dtype, f" as {what}")


def not_finite(source: str, dtype: torch.dtype, where: str) -> NumberError:
    """The error for a network that gives NaN or infinity."""
    name = str(dtype).removeprefix("torch.")
    if dtype in (torch.float32, torch.float64):
        advice = "look at its weights, and at guidance_scale and temperature if they are unusual"
    else:
        advice = f"load it in {'bfloat16 or float32' if dtype == torch.float16 else 'float32'}"
    return NumberError(f"{source} gave NaN or infinity in {name}{where}: {advice}.")
