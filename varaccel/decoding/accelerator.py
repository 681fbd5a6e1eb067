"""Accelerators: frozen options with a name that say how a call is decoded."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from varaccel.decoding.canvas import Canvas
from varaccel.decoding.loop import OnStep, decode
from varaccel.decoding.order import Raster, StaggeredRows
from varaccel.decoding.randomness import Randomness
from varaccel.decoding.session import Session
from varaccel.errors import InputError, unknown_name


@dataclass(frozen=True)
class Job:
    """One call as an accelerator sees it.

    Attributes:
        open_session: makes a session of the host model for this call; takes the session's options.
        grid_width: columns of the token grid.
        canvas: to be filled.
        randomness: the draws of each picture and position.
        on_step: observer of every pass.
    """

    open_session: Callable[..., Session]
    grid_width: int
    canvas: Canvas
    randomness: Randomness
    on_step: OnStep | None = None


class Accelerator(ABC):
    """Base of all accelerators; subclasses are frozen dataclasses registered with `register`.

    Class attributes:
        name: what the user types.
        lossless: whether the pictures follow exactly the law of plain decoding.
        hosts: model families it works on.
        summary: one line for lists and help texts.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    hosts: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]

    @abstractmethod
    def run(self, job: Job) -> int:
        """Fill `job.canvas`; return the number of forward passes of the host model."""


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
    """What the `accelerator=` argument of a pipeline means on a host family.

    Raises:
        InputError: unknown, of the wrong type, or not made for this family.
    """
    if accelerator is None:
        accelerator = Plain()
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


@register
@dataclass(frozen=True)
class Plain(Accelerator):
    """One token per pass in raster order: the reference that every speed-up is stated against."""

    name: ClassVar[str] = "plain"
    lossless: ClassVar[bool] = True
    hosts: ClassVar[tuple[str, ...]] = ("llamagen",)
    summary: ClassVar[str] = "one token per pass, in raster order"

    def run(self, job: Job) -> int:
        return decode(job.open_session(), job.canvas, Raster(), job.randomness, job.on_step)


@register
@dataclass(frozen=True)
class ZipAR(Accelerator):
    """Decode several rows at once, each a window behind the row above (He et al. 2024, arXiv 2412.04062).

    Training-free and approximate: a token does not see the right part of the rows above it that is not there
    yet. With `window` at least the row width it is raster decoding.

    Attributes:
        window: lag between rows in tokens, at least 1. Smaller is faster and further from the plain law.
        mode: "masked" starts every row early, W + (H - 1) * window passes, and hides empty slots from
            attention. "published" is the published code: the first row is finished before the second
            starts, 2 W + (H - 2) * window passes, and empty slots are visible with zero key and value.

    Raises:
        InputError: window below 1, or an unknown mode.
    """

    name: ClassVar[str] = "zipar"
    lossless: ClassVar[bool] = False
    hosts: ClassVar[tuple[str, ...]] = ("llamagen",)
    summary: ClassVar[str] = "rows in parallel, each a window behind the row above (approximate)"

    window: int = 8
    mode: str = "masked"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise InputError(f"ZipAR window must be an integer >= 1, got {self.window!r}.")
        if self.mode not in ("masked", "published"):
            raise unknown_name("ZipAR mode", self.mode, ["masked", "published"])

    def run(self, job: Job) -> int:
        published = self.mode == "published"
        order = StaggeredRows(job.grid_width, self.window, first_row_alone=published)
        session = job.open_session(visibility="causal" if published else "encoded")
        return decode(session, job.canvas, order, job.randomness, job.on_step)
