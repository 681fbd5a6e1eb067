"""Accelerators: frozen options with a name that say how a call is decoded."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varaccel.decoding.canvas import Canvas
from varaccel.decoding.lanes import Lanes
from varaccel.decoding.loop import OnStep
from varaccel.decoding.order import Order
from varaccel.decoding.randomness import Randomness
from varaccel.decoding.statistics import Counts
from varaccel.errors import InputError, unknown_name


@dataclass(frozen=True)
class Job:
    """One call as an accelerator sees it.

    Attributes:
        open_session: makes a session for this call, of the host model or of another `network` of the same
            conditions and codes; takes the session's options. What it makes depends on the family: a
            `CausalSession` for networks that decide one token after the other.
        network: the host model.
        grid_width: columns of the token grid.
        codes: size of the vocabulary, 0 where tokens are continuous.
        canvas: to be filled.
        rows: rows that a pass reads per token: pictures, times two while guided.
        randomness: the draws of each picture and position. A family may offer another source of draws; then only
            its `sample` can be relied on.
        order: in which the family decides its positions without acceleration.
        on_step: observer of every pass.
        neighbours: gives the codebook's table of nearest neighbours, (k, normalise) -> [V, k + 1] int.
        drafters: the drafters that came with the model, by name.
    """

    open_session: Callable[..., Any]
    network: nn.Module
    grid_width: int
    codes: int
    canvas: Canvas
    rows: int
    randomness: Randomness
    order: Order[Any]
    on_step: OnStep | None = None
    neighbours: Callable[[int, bool], Tensor] | None = None
    drafters: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.canvas.written.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the host model's weights."""
        return next(self.network.parameters()).dtype

    def lanes(self, order: int | str) -> Lanes:
        """Lanes of an `order` option: "raster", or the window of ZipAR's order."""
        if isinstance(order, str):
            return Lanes.raster(self.canvas.num_positions)
        return Lanes.rows(self.grid_width, self.canvas.num_positions, order)


class Accelerator(ABC):
    """Base of all accelerators; subclasses are frozen dataclasses registered with `register`.

    Class attributes:
        name: what the user types.
        lossless: whether the pictures follow exactly the law of plain decoding, with default options.
        hosts: model families it works on.
        summary: one line for lists and help texts.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    hosts: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]

    @property
    def keeps_law(self) -> bool:
        """Whether the pictures follow exactly the law of plain decoding, with these options."""
        return self.lossless

    def resolve(self, job: Job) -> Accelerator:
        """The accelerator that runs; another one than this if it chooses by the call."""
        return self

    @abstractmethod
    def run(self, job: Job) -> Counts:
        """Fill `job.canvas`; return the number of forward passes of the host model, or more about them."""

    def options(self) -> dict[str, Any]:
        """The options as plain values; objects by what they are called."""
        plain = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Accelerator):
                value = {"name": value.name, **value.options()}
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = {"name": type(value).__name__, **dataclasses.asdict(value)}
            elif not isinstance(value, (str, int, float, bool, list, tuple, type(None))):
                value = type(value).__name__
            plain[item.name] = value
        return plain


ACCELERATORS: dict[str, type[Accelerator]] = {}


def register(cls: type[Accelerator]) -> type[Accelerator]:
    """Make an accelerator available by its name. The test suite runs over everything registered."""
    if cls.name in ACCELERATORS:
        raise ValueError(f"an accelerator called {cls.name!r} is registered already")
    ACCELERATORS[cls.name] = cls
    return cls


def make_accelerator(name: str, options: Mapping[str, Any] | None = None) -> Accelerator:
    """An accelerator by registered name, with its options.

    Raises:
        InputError: an unknown name or option; a value that the accelerator refuses.
    """
    if name not in ACCELERATORS:
        raise unknown_name("accelerator", name, ACCELERATORS)
    cls = ACCELERATORS[name]
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in known:
            raise unknown_name(f"option of accelerator {name!r}", option, known)
    return cls(**(options or {}))


def resolve_accelerator(accelerator: Accelerator | str | None, host: str) -> Accelerator:
    """What the `accelerator=` argument of a pipeline means on a host family; None is plain decoding.

    Raises:
        InputError: unknown, of the wrong type, or not made for this family.
    """
    if accelerator is None:
        accelerator = "plain"
    if isinstance(accelerator, str):
        accelerator = make_accelerator(accelerator)
    if not isinstance(accelerator, Accelerator):
        raise InputError(
            f"accelerator must be an Accelerator, its name or None, got {type(accelerator).__name__}."
        )
    if host not in accelerator.hosts:
        raise InputError(
            f"{accelerator.name!r} does not work on {host} models, only on {', '.join(accelerator.hosts)}."
        )
    return accelerator
