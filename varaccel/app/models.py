"""Which models the page offers, and loading them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from varaccel.accelerators import ACCELERATORS, make_accelerator
from varaccel.engine.accelerator import AnyAccelerator
from varaccel.engine.job import Job
from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.hosts.causal.job import CausalJob
from varaccel.pipelines import auto  # noqa: F401 - makes the library's pipelines known
from varaccel.pipelines.base import TokenPipeline
from varaccel.pipelines.catalog import PUBLISHED
from varaccel.pipelines.loading import PIPELINES, pipeline_class_name
from varaccel.shipped import shipped_models
from varaccel.speculation.drafters import DRAFTERS

NETWORK_OPTIONS = ("refiner", "drafter")
"""Options of accelerators that may name a further model to load."""

LARGEST_OPTION = 1000
"""Of integers that visitors give: a chain of 100,000 draft tokens would take the memory of all."""


class ModelShelf:
    """The models that visitors may choose, loaded when they are first used.

    Args:
        names: what may be chosen.
        load: a pipeline by name, with its progress bar switched off.
        kept: names that stay loaded, such as those of small models; of the others the last one does.
        any_model: let visitors type folders and hub ids as well.

    Raises:
        InputError: there is no model to choose.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Callable[[str], Any],
        *,
        kept: Sequence[str] = (),
        any_model: bool = False,
    ) -> None:
        if not names:
            raise InputError("no model ships with this copy of varaccel; name one with --model.")
        self.names = tuple(names)
        self.any_model = any_model
        self._load = load
        self._kept = frozenset(kept)
        self._loaded: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._types: dict[str, type[TokenPipeline]] = {}

    def pipeline(self, name: str) -> Any:
        """A model that may be chosen.

        Raises:
            VaraccelError: it may not, or cannot be loaded.
        """
        self.check(name)
        with self._lock:  # one download and one copy, however many ask
            if name not in self._loaded:
                if name not in self._kept:  # one of these at a time: published models fill a machine
                    self._loaded = {known: p for known, p in self._loaded.items() if known in self._kept}
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def check(self, name: str) -> None:
        """Refuse a model that visitors may not choose.

        Raises:
            InputError: the name is none of ours.
        """
        if not self.any_model and name not in self.names:
            raise unknown_name("model of this page", name, self.names)

    def pipeline_type(self, name: str) -> type[TokenPipeline]:
        """The class of a model's pipeline; found without loading it where its folder or our catalogue tells."""
        if name not in self._types:
            self._types[name] = pipeline_type_of(name) or type(self.pipeline(name))
        return self._types[name]

    def job_type(self, name: str) -> type[Job]:
        """The kind of job that a model's pipeline makes, which accelerators have to fit."""
        return self.pipeline_type(name).job_type

    def accelerator(self, name: str, options: Mapping[str, Any]) -> AnyAccelerator:
        """An accelerator with options as a visitor gave them.

        Raises:
            InputError: an unknown name, or options that cannot be used.
        """
        chosen = make_accelerator(name, options)
        self.check_accelerator(chosen)
        return chosen

    def check_accelerator(self, accelerator: AnyAccelerator) -> None:
        """Refuse what a visitor may not ask of an accelerator.

        Raises:
            InputError: it would load a model that is not offered, or a number is so large that it would fill the
                memory of everybody.
        """
        for field in dataclasses.fields(accelerator):
            value = getattr(accelerator, field.name)
            if largest_integer(value) > LARGEST_OPTION:
                raise InputError(
                    f"{field.name} of {accelerator.name} is {largest_integer(value)}; this page takes numbers up to "
                    f"{LARGEST_OPTION}."
                )
            own = (
                issubclass(accelerator.job_type, CausalJob) and value in DRAFTERS
            )  # parts of the model itself
            if field.name in NETWORK_OPTIONS and isinstance(value, str) and not own:
                self.check(value)


def largest_integer(value: Any) -> int:
    """The largest integer in a plain value or in the lists, mappings and dataclasses that it is made of, at least 0."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return max(map(largest_integer, value), default=0)
    return max(0, value) if isinstance(value, int) else 0


def fitting_prompt(pipe: Any, prompt: str, proposed: str) -> str:
    """A prompt for a model: the one that is there if the model can draw it, else what a page proposes.

    Args:
        proposed: for models that take descriptions; others are proposed their first class.
    """
    classes = pipe.config.get("class_names")
    if pipe.text_encoder is not None:
        return prompt if prompt.strip() else proposed
    try:
        pipe.class_label(prompt)
    except InputError:
        return str(classes[0]).split(",")[0] if classes else "0"
    return prompt


def pipeline_type_of(name: str) -> type[TokenPipeline] | None:
    """The class of a model's pipeline as its folder or our catalogue tells, None if neither knows."""
    if name in PUBLISHED:
        known = (cls for cls in PIPELINES.values() if issubclass(cls, TokenPipeline))
        return next(cls for cls in known if getattr(cls, "family", None) == PUBLISHED[name].family)
    folder = shipped_models().get(name, Path(name))
    try:
        found = PIPELINES.get(pipeline_class_name(folder))
    except (OSError, CheckpointError):
        return None
    return found if found is not None and issubclass(found, TokenPipeline) else None


def takes_models(accelerator: str, option: str) -> bool:
    """Whether an option names a further model; causal accelerators know the drafters that came with the model."""
    return option in NETWORK_OPTIONS and not issubclass(ACCELERATORS[accelerator].job_type, CausalJob)


def uses_models(accelerator: str) -> bool:
    """Whether any option of an accelerator names a further model."""
    return any(
        takes_models(accelerator, field.name) for field in dataclasses.fields(ACCELERATORS[accelerator])
    )
