"""Options as text, as they are typed on a command line or in a form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from varaccel.errors import InputError


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """The options of `key=value` texts; values are JSON where they parse, else strings.

    Raises:
        InputError: a text without a key or an equals sign.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"an option is written key=value, got {pair!r}.")
        try:
            options[key] = json.loads(value)
        except ValueError:  # also a number of more digits than Python reads
            options[key] = value
    return options


def split_options(text: str) -> list[str]:
    """`key=value,key=value` split at its commas, except those within brackets or double quotes."""
    pieces, depth, quoted = [""], 0, False
    for index, letter in enumerate(text):
        if letter == '"' and text[index - 1 : index] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth <= 0 and not quoted:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]
