"""Accelerators as text: `name:key=value,key=value`, as in grids, presets and on command lines."""

from __future__ import annotations

from collections.abc import Iterable

from varaccel.accelerators import AnyAccelerator, make_accelerator
from varaccel.engine.option_text import parse_options, split_options
from varaccel.errors import InputError


def parse_accelerator(text: str) -> AnyAccelerator:
    """An accelerator as typed: `NAME` or `NAME:key=value,key=value`, such as `zipar:window=4,mode=published`.

    Values are JSON where they parse, so lists keep their commas: `name:tree=[1, 2, 3],k=100`.

    Raises:
        InputError: an unknown name or option, or a value that the accelerator refuses; quotes `text`.
    """
    name, _, options = text.partition(":")
    try:
        return make_accelerator(name.strip(), parse_options(split_options(options)))
    except InputError as error:
        raise InputError(f"accelerator {text!r}: {error}") from error


def parse_grid(texts: Iterable[str]) -> list[AnyAccelerator]:
    """The accelerators of several texts; see `parse_accelerator`."""
    return [parse_accelerator(text) for text in texts]
