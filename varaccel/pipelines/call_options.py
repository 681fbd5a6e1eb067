"""Options of a pipeline call as a command line passes them on."""

from __future__ import annotations

import inspect
from typing import Any

from varaccel.errors import InputError


def call_options(pipe: Any, model: str, **options: Any) -> dict[str, Any]:
    """Those options of a call that were given (are not None); the others are left to the model.

    Raises:
        InputError: an option that calls of this pipeline do not have.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise InputError(f"{model} has no --{name.replace('_', '-')} to choose; leave that option out.")
    return given
