"""Checks of options: what cannot be used is one sentence, what can is a Python number."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varaccel.errors import InputError, unknown_name

MAX_NUMBER = float(torch.finfo(torch.float32).max)
"""Numbers beyond it are infinite to a network."""


MIN_TEMPERATURE = 1e-5
"""What smaller temperatures above 0 count as, as published (LlamaGen): logits divided by less would be infinite."""


def as_integer(value: object) -> int | None:
    """The integer that a Python, NumPy or torch integer stands for; None for everything else, truth values too."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return None


def as_number(value: object) -> float | None:
    """The number that a Python, NumPy or torch number stands for, finite in float32; None for everything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and value.dtype.is_floating_point else as_integer(value)
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        return None
    try:
        number: Any = value if type(value) is int else float(value)
        return number if abs(number) <= MAX_NUMBER else None
    except OverflowError:
        return None


def check_integer(what: str, value: object, *, least: int = 1, most: int | None = None, off: str = "") -> int:
    """`value` as an integer in a range.

    Args:
        what: the option, for the message.
        most: no upper end if None.
        off: what a value switches off, said in brackets.

    Raises:
        InputError: no integer, or outside.
    """
    number = as_integer(value)
    if number is None or number < least or (most is not None and number > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{what} must be an integer {wanted}{_note(off)}, got {_shown(value)}.")
    return number


def positive_integer(what: str, value: object) -> int:
    """`value` as an integer of at least 1.

    Raises:
        InputError: no integer, or below.
    """
    return check_integer(what, value)


def check_number(
    what: str,
    value: object,
    *,
    least: float = 0.0,
    most: float | None = None,
    above: bool = False,
    off: str = "",
) -> float:
    """`value` as a finite number in a range.

    Args:
        what: the option, for the message.
        least: the lower end; `above`: which is not itself in the range, for ranges without an upper end.
        most: no upper end if None.
        off: what a value switches off, said in brackets.

    Raises:
        InputError: no number, not finite in float32, or outside.
    """
    number = as_number(value)
    outside = number is None or number < least or (above and number == least)
    if number is None or outside or (most is not None and number > most):
        wanted = (
            f"{'above' if above else 'of at least'} {least:g}"
            if most is None
            else f"from {least:g} to {most:g}"
        )
        raise InputError(f"{what} must be a number {wanted}{_note(off)}, got {_shown(value)}.")
    return number


def check_flag(what: str, value: object) -> bool:
    """`value` as a truth value.

    Raises:
        InputError: anything else, numbers too.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{what} must be True or False, got {_shown(value)}.")
    return bool(value)


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise InputError unless `value` is one of the known names."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise unknown_name(what, str(value), known)


def settle(instance: object, **values: object) -> None:
    """Give fields of a frozen dataclass their checked values, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def check_row_window(row_window: int | None) -> int | None:
    """`row_window` as an integer of at least 1, or None.

    Raises:
        InputError: anything else.
    """
    return None if row_window is None else positive_integer("row_window", row_window)


def _note(off: str) -> str:
    return f" ({off})" if off else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
