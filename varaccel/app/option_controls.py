"""Accelerators' options as controls of the page, read off their dataclasses and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr
from gradio.components import Component

from varaccel.accelerators import ACCELERATORS
from varaccel.app.models import NETWORK_OPTIONS, takes_models
from varaccel.engine.accelerator import AnyAccelerator
from varaccel.engine.option_text import parse_options
from varaccel.errors import InputError
from varaccel.speculation.drafters import DRAFTERS

Kind = Literal["integer", "number", "choice", "switch", "text"]

MODELS_OWN = "the model's own"
"""What stands in a control that leaves the choice to the model."""

RANGES: Mapping[str, tuple[float, float, float]] = {
    "window": (1, 32, 1),
    "k": (0, 200, 1),
    "refresh": (1, 16, 1),
    "draft_length": (1, 16, 1),
    "prefill": (0, 1, 0.05),
}
"""Least, most and step of sliders: what makes sense on small models; larger values go through the API."""


@dataclass(frozen=True)
class Option:
    """An option of an accelerator as a form shows it.

    Attributes:
        name: of the dataclass field.
        kind: what a visitor gives.
        default: of the field; None leaves the choice to the model or the accelerator.
        choices: of kind "choice".
        optional: whether it may be left empty.
        help: what it means, the first sentence of the docstring.
    """

    name: str
    kind: Kind
    default: Any
    choices: tuple[str, ...] = ()
    optional: bool = False
    help: str = ""


def options_of(accelerator: type[AnyAccelerator], models: Sequence[str] = ()) -> list[Option]:
    """The options of an accelerator, in order.

    Args:
        models: names that an option for a further network may take.
    """
    hints = typing.get_type_hints(accelerator)
    meanings = attribute_texts(accelerator)
    found = []
    for field in dataclasses.fields(accelerator):
        kind, choices, optional = _kind(hints[field.name])
        if field.name in NETWORK_OPTIONS:
            named = takes_models(accelerator.name, field.name)
            kind, choices, optional = "choice", tuple(models) if named else DRAFTERS, named
        found.append(Option(field.name, kind, field.default, choices, optional, meanings.get(field.name, "")))
    return found


def _kind(hint: Any) -> tuple[Kind, tuple[str, ...], bool]:
    """What a visitor gives for a type, the choices, and whether None is among its values."""
    if typing.get_origin(hint) is Literal:
        return "choice", typing.get_args(hint), False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = len(rest) < len(typing.get_args(hint))
        if len(rest) == 1:
            kind, choices, _ = _kind(rest[0])
            return kind, choices, optional
        return "text", (), optional
    kinds: dict[Any, Kind] = {bool: "switch", int: "integer", float: "number"}
    return kinds.get(hint, "text"), (), False


def attribute_texts(accelerator: type) -> dict[str, str]:
    """What docstrings say about each option: up to the end of the first sentence, base classes and leads followed."""
    texts: dict[str, str] = {}
    for cls in reversed(accelerator.__mro__):
        if "Attributes:\n" not in (cls.__doc__ or ""):
            continue
        section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        section = re.split(r"\n(?=\S)", section)[0]
        for entry in re.split(r"\n {4}(?=\w)", "\n" + section):
            names, colon, text = entry.partition(":")
            if not colon:
                continue
            sentence = re.split(r"(?<=\.)\s", " ".join(text.replace("`", "").split()))[0]
            told = {name.strip(): sentence for name in names.split(",")}
            lead = re.match(r"(?:see|as for|as in) (\w+)\.", sentence)
            if lead is not None:
                known = {c.__name__: c for c in ACCELERATORS.values() if c is not cls}
                there = attribute_texts(known[lead[1]]) if lead[1] in known else texts
                told = {name: there.get(name, "") for name in told}
            texts |= told
    return texts


def chosen_options(accelerator: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the controls give them, without those that are empty or the default.

    Raises:
        InputError: a number that is none.
    """
    chosen = {}
    for option in options_of(ACCELERATORS[accelerator]):
        value = values.get(option.name)
        if value is None or value == "":
            if option.optional or option.name not in values:
                continue
            raise InputError(f"{option.name} of {accelerator} is empty; give a value.")
        if isinstance(value, str) and option.kind in ("integer", "number", "text"):
            value = parse_options([f"{option.name}={value}"])[option.name]
        if option.kind in ("integer", "number") and (
            isinstance(value, bool) or not isinstance(value, (int, float))
        ):
            raise InputError(f"{option.name} of {accelerator} must be a number, got {value!r}.")
        if option.kind == "integer" and value == int(value):
            value = int(value)
        if value != option.default:
            chosen[option.name] = value
    return chosen


def control(option: Option, start: Any = None) -> Component:
    """The control of an option, which starts from its default unless told otherwise."""
    default = option.default if start is None else start
    label = option.name.replace("_", " ")
    info = option.help or None
    if option.kind == "switch":
        return gr.Checkbox(default, label=label, info=info)
    if option.kind == "choice":
        choices: list[Any] = list(option.choices)
        if option.optional:
            choices = [(MODELS_OWN, ""), *choices]
        value = "" if default is None else default
        # a browser may still send what fitted the model before for controls that it does not show; what a call uses
        # is checked when it is made
        stale = option.name in NETWORK_OPTIONS
        return gr.Dropdown(choices, value=value, label=label, info=info, allow_custom_value=stale)
    if option.optional:  # a Number of gradio shows 0 where it should be empty
        return gr.Textbox(
            "" if default is None else str(default),
            label=label,
            info=info,
            placeholder=MODELS_OWN,
            max_lines=1,
        )
    if option.kind in ("integer", "number"):
        if option.name in RANGES:
            least, most, step = RANGES[option.name]
            return gr.Slider(least, most, default, step=step, label=label, info=info)
        precision = 0 if option.kind == "integer" else None
        return gr.Number(default, label=label, info=info, precision=precision)
    return gr.Textbox(str(default), label=label, info=info)
