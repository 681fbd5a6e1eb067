"""Accelerators: frozen options with a name that say how a call is decoded."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, Never, TypeVar, cast

from torch import nn

from varaccel.engine.counts import Counts
from varaccel.engine.job import Job, network_of
from varaccel.errors import InputError, unknown_name

JobT = TypeVar("JobT", bound=Job, contravariant=True)


@dataclass(frozen=True)
class Plan:
    """What an accelerator will do with one call.

    Attributes:
        accelerator: what runs, as statistics name it.
        run: fills the canvas; see `Accelerator.run`.
    """

    accelerator: AnyAccelerator
    run: Callable[[], Counts]


@dataclass(frozen=True)
class Accelerator(ABC, Generic[JobT]):
    """Base of all accelerators; subclasses are frozen dataclasses registered with `register`.

    Class attributes:
        name: what the user types.
        job_type: the kind of job that it can do: `CausalJob`, `ScaleJob`, `MaskedJob`, or `Job` for all.
        summary: one line for lists and help texts.
    """

    name: ClassVar[str]
    job_type: ClassVar[type[Job]]
    summary: ClassVar[str]

    @property
    def continuous(self) -> bool:
        """Whether `run` decodes `job.batch_size` images at a time, each at its own pace, and gives the place of a
        finished one to the next. Others get jobs of so many images, one after the other."""
        return False

    @property
    @abstractmethod
    def lossless(self) -> bool:
        """Whether the images follow exactly the distribution of plain decoding, with these options."""

    def plan(self, job: JobT) -> Plan:
        """What runs; another accelerator than this if it chooses by the call."""
        return Plan(self, partial(self.run, job))

    @abstractmethod
    def run(self, job: JobT) -> Counts:
        """Fill `job.canvas`; return the number of forward passes of the host model, or more about them."""

    def networks(self) -> list[nn.Module]:
        """The networks among the options, those of pipelines included."""
        found: list[nn.Module] = []
        for item in dataclasses.fields(self):
            value = network_of(getattr(self, item.name))
            if isinstance(value, Accelerator):
                found += value.networks()
            elif isinstance(value, nn.Module):
                found.append(value)
        return found

    def options(self) -> dict[str, Any]:
        """The options as plain values; objects by what they are called."""
        plain = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Accelerator):
                value = {"name": value.name, **value.options()}
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = {"name": type(value).__name__, **dataclasses.asdict(value)}
            elif not isinstance(value, (str, int, float, bool, list, tuple, type(None))):
                value = type(value).__name__
            plain[item.name] = value
        return plain


AnyAccelerator = Accelerator[Never]
"""An accelerator of jobs that are not known yet: it can be asked about itself, not run."""

ACCELERATORS: dict[str, type[AnyAccelerator]] = {}


AcceleratorT = TypeVar("AcceleratorT", bound=type[AnyAccelerator])


def register(cls: AcceleratorT) -> AcceleratorT:
    """Make an accelerator available by its name. The test suite runs over everything registered."""
    if not issubclass(getattr(cls, "job_type", object), Job):
        raise TypeError(
            f"{cls.__name__} must say in `job_type` which kind of job it can do, such as CausalJob"
        )
    if cls.name in ACCELERATORS:
        raise ValueError(f"an accelerator called {cls.name!r} is registered already")
    ACCELERATORS[cls.name] = cls
    return cls


def fitting(job_type: type[Job]) -> list[str]:
    """Names of the registered accelerators that can do jobs of this kind, in the order of the alphabet."""
    return sorted(name for name, cls in ACCELERATORS.items() if issubclass(job_type, cls.job_type))


def make_accelerator(name: str, options: Mapping[str, object] | None = None) -> AnyAccelerator:
    """An accelerator by registered name, with its options.

    Raises:
        InputError: an unknown name or option; a value that the accelerator refuses.
    """
    if name not in ACCELERATORS:
        raise unknown_name("accelerator", name, ACCELERATORS)
    cls = ACCELERATORS[name]
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options or {}:
        if option not in known:
            raise unknown_name(f"option of accelerator {name!r}", option, known)
    return cls(**(options or {}))


def plan_call(accelerator: AnyAccelerator, job: Job) -> Plan:
    """What an accelerator will do with a job.

    Raises:
        InputError: a job of a kind that it cannot do.
    """
    if not isinstance(job, accelerator.job_type):
        raise InputError(
            f"{accelerator.name!r} cannot do a {type(job).__name__}; what can: {', '.join(fitting(type(job)))}."
        )
    return cast("Accelerator[Job]", accelerator).plan(
        job
    )  # the one place where the kind is checked, not known


def resolve_accelerator(
    accelerator: AnyAccelerator | str | None, job_type: type[Job], model: str = "this model"
) -> AnyAccelerator:
    """What the `accelerator=` argument of a pipeline means for a kind of job; None is plain decoding.

    Args:
        job_type: the kind of job that the pipeline makes.
        model: what the pipeline is called in messages.

    Raises:
        InputError: unknown, of the wrong type, or not made for this kind of job.
    """
    if accelerator is None:
        accelerator = "plain"
    if isinstance(accelerator, str):
        accelerator = make_accelerator(accelerator)
    if not isinstance(accelerator, Accelerator):
        raise InputError(
            f"accelerator must be an Accelerator, its name or None, got {type(accelerator).__name__}."
        )
    if not issubclass(job_type, accelerator.job_type):
        raise InputError(
            f"{accelerator.name!r} does not work on {model}; what does: {', '.join(fitting(job_type))}."
        )
    return accelerator
