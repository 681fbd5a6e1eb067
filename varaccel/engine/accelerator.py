"""Accelerators: frozen options with a name that say how a call is decoded."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from varaccel.engine.job import Job
from varaccel.engine.statistics import Counts
from varaccel.errors import InputError, unknown_name


class Accelerator(ABC):
    """Base of all accelerators; subclasses are frozen dataclasses registered with `register`.

    Class attributes:
        name: what the user types.
        hosts: model families it works on.
        summary: one line for lists and help texts.
    """

    name: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]

    @property
    @abstractmethod
    def lossless(self) -> bool:
        """Whether the images follow exactly the distribution of plain decoding, with these options."""

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
