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


def check_order(order: int | str) -> None:
    """Raise InputError unless `order` is "raster" or the window of ZipAR's order."""
    if order == "raster":
        return
    if isinstance(order, str):
        raise InputError(
            f'order must be "raster" or an integer, the window of ZipAR\'s order, got {order!r}.'
        )
    positive_integer("the ZipAR window given as order", order)
