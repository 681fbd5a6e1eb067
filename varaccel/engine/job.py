"""One call as an accelerator sees it. The kinds of jobs, one per paradigm, are in `varaccel.hosts`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from varaccel.engine.canvas import Canvas
from varaccel.engine.loop import OnStep
from varaccel.engine.network import Network
from varaccel.engine.session import OpenSession
from varaccel.errors import InputError


def network_of(given: object) -> object:
    """The transformer of a pipeline; anything else as it is, a network with a part of that name included."""
    return given if isinstance(given, nn.Module) else getattr(given, "transformer", given)


Transforms = Callable[[Any], Callable[..., Tensor] | None]
"""The compiled version of a network's pass, None for a network that is not compiled."""


def eager(network: Any) -> None:
    """The `Transforms` of a call in which nothing is compiled."""


LoadNetwork = Callable[[str, torch.device, torch.dtype], object]
"""Finds the network of a model by the model's name, and puts it on a device."""


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """What all kinds of jobs have. A kind adds how the family decides, and opens its sessions.

    Attributes:
        network: the host model.
        canvas: to be filled.
        rows: rows that a pass reads per token: images, times the branches of guidance (two, as a rule).
        batch_size: images that may be decoded at once, for continuous accelerators; all if None.
        on_step: observer of every pass.
        drafters: the further networks that came with the model, by name.
        load_network: for networks that are given by name; None if the call cannot load any.
        transforms: compiled versions of the passes of its networks.
        sessions: all that were opened, the host model's first unless the accelerator has another idea.
    """

    network: Network
    canvas: Canvas
    rows: int
    batch_size: int | None = None
    on_step: OnStep | None = None
    drafters: Mapping[str, nn.Module] = field(default_factory=dict)
    load_network: LoadNetwork | None = None
    transforms: Transforms = eager
    sessions: list[OpenSession] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.canvas.written.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the host model's weights."""
        return next(self.network.parameters()).dtype

    @property
    def cache_bytes(self) -> int:
        """Size of the caches that exist at a time."""
        return sum(session.cache_bytes for session in self.sessions)

    def report_numbers(self) -> None:
        """Tell what the sessions saw of the numbers of their networks; waits for the device.

        Raises:
            NumberError: NaN or infinity.
        """
        for session in self.sessions:
            for check in session.number_checks:
                check.report()

    @property
    def at_once(self) -> int:
        """Images that are decoded at once, those that `rows` counts."""
        total = self.canvas.batch
        return total if self.batch_size is None else min(total, self.batch_size)

    def part(self, images: Sequence[int]) -> Self:
        """The job of some of the images, with a canvas and sessions of its own.

        Raises:
            InputError: a kind of job that has no parts.
        """
        return replace(
            self,
            canvas=self.canvas.part(torch.tensor(images, device=self.device)),
            rows=self.rows // self.at_once * len(images),
            batch_size=None,
            sessions=[],
            **self._of_images(images),
        )

    def _of_images(self, images: Sequence[int]) -> dict[str, Any]:
        """What else a kind of job holds of some of its images, by the names of its attributes."""
        raise InputError(f"a {type(self).__name__} does all images at once; leave batch_size out.")

    def release(self) -> None:
        """Free what only decoding needs, when the canvas is full."""
        self.sessions.clear()

    @abstractmethod
    def decode(self) -> int:
        """Fill the canvas with the host model in the family's own schedule. Returns the number of passes."""

    def resolve_network(self, chosen: object, name: str) -> object:
        """The network that an option of an accelerator means; not checked for fitting.

        Args:
            chosen: a network, a pipeline that has a `transformer`, the name of such a pipeline, or None for the
                drafter called `name` that came with the model.

        Returns:
            the network, None if there is none.

        Raises:
            CheckpointError: there is no model of that name.
        """
        found = self.drafters.get(name) if chosen is None else chosen
        if isinstance(found, str) and self.load_network is not None:
            found = self.load_network(found, self.device, self.dtype)
        return network_of(found)
