"""Checks of accelerator options: what cannot be used is one sentence."""

from __future__ import annotations

from collections.abc import Iterable

from varaccel.errors import InputError, unknown_name


def positive_integer(what: str, value: object) -> None:
    """Raise InputError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} must be an integer >= 1, got {value!r}.")


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise InputError unless `value` is one of the known names."""
    known = list(known)
    if value not in known:
        raise unknown_name(what, str(value), known)


def check_row_window(row_window: int | None) -> None:
    """Raise InputError unless `row_window` is None or an integer of at least 1."""
    if row_window is not None:
        positive_integer("row_window", row_window)
