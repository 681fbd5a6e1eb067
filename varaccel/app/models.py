"""Which models the page offers, and loading them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from varaccel.accelerators import ACCELERATORS, Accelerator, make_accelerator
from varaccel.accelerators.speculative import DRAFTERS
from varaccel.errors import InputError, unknown_name

NETWORK_OPTIONS = ("refiner", "drafter")
"""Options of accelerators that may name a further model to load."""

LARGEST_OPTION = 1000
"""Of integers that visitors give: a chain of 100,000 guesses would take the memory of all."""


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
        self._families: dict[str, str] = {}

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

    def family(self, name: str) -> str:
        """The family of a model; found without loading it where its folder or our catalogue tells."""
        if name not in self._families:
            self._families[name] = family_of(name) or self.pipeline(name).family
        return self._families[name]

    def accelerator(self, name: str, options: Mapping[str, Any]) -> Accelerator:
        """An accelerator with options as a visitor gave them.

        Raises:
            InputError: an unknown name, or options that cannot be used.
        """
        chosen = make_accelerator(name, options)
        self.check_accelerator(chosen)
        return chosen

    def check_accelerator(self, accelerator: Accelerator) -> None:
        """Refuse what a visitor may not ask of an accelerator.

        Raises:
            InputError: it would load a model that is not offered, or a number is so large that it would fill the
                memory of everybody.
        """
        for field in dataclasses.fields(accelerator):  # type: ignore[arg-type]
            value = getattr(accelerator, field.name)
            if largest_integer(value) > LARGEST_OPTION:
                raise InputError(
                    f"{field.name} of {accelerator.name} is {largest_integer(value)}; this page takes numbers up to "
                    f"{LARGEST_OPTION}."
                )
            own = "llamagen" in accelerator.hosts and value in DRAFTERS  # parts of the model itself
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


def family_of(name: str) -> str | None:
    """The family of a model as its folder or our catalogue tells, None if neither knows."""
    from pathlib import Path

    from varaccel.errors import CheckpointError
    from varaccel.pipelines.auto import PIPELINES
    from varaccel.pipelines.catalog import PUBLISHED
    from varaccel.pipelines.loading import pipeline_class_name
    from varaccel.shipped import shipped_models

    if name in PUBLISHED:
        return PUBLISHED[name].family
    folder = shipped_models().get(name, Path(name))
    try:
        pipeline: Any = PIPELINES.get(pipeline_class_name(folder))
    except (OSError, CheckpointError):
        return None
    return None if pipeline is None else str(pipeline.family)


def accelerators_of(family: str) -> list[str]:
    """Names of the accelerators that work on a family."""
    return [name for name, cls in ACCELERATORS.items() if family in cls.hosts]
