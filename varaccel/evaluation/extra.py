"""What evaluation needs beside the library itself."""

from __future__ import annotations

from importlib.util import find_spec

from varaccel.errors import InputError


def check_extra(*modules: str) -> None:
    """Refuse, before any work is done, what needs a module that is not installed.

    Raises:
        InputError: one is missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(f"this needs {' and '.join(missing)}; install it with `pip install varaccel[eval]`.")
