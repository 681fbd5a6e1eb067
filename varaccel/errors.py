"""The errors a user meets: one sentence that says what is wrong and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VaraccelError(Exception):
    """Base of every error raised on purpose by this library."""


class InputError(VaraccelError, ValueError):
    """An argument of a call cannot be used."""


class CheckpointError(VaraccelError, ValueError):
    """A weights file or model folder cannot be used."""


class NumberError(VaraccelError, ArithmeticError):
    """A network gave NaN or infinity, of which no image can be made."""


class ProcessFailed(VaraccelError):
    """One process of a launch of several cannot go on; the message names the process and the reason."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not registered; suggests the nearest known one.

    Up to twelve known names are listed, the nearest first if there are more.
    """
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3)
    hint = f" did you mean {near[0]!r}?" if near else ""
    listed = options if len(options) <= 12 else list(dict.fromkeys([*near, *options]))[:12]
    more = f" and {len(options) - len(listed)} more" if len(options) > len(listed) else ""
    shown = name if len(name) <= 60 else name[:59] + "…"
    return InputError(f"unknown {kind} {shown!r};{hint} known: {', '.join(listed) or 'none'}{more}.")
