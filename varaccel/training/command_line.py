"""How command lines end: bad input is one sentence and no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from varaccel.errors import VaraccelError


def exit_status(work: Callable[[], object]) -> int:
    """Do the work; 0 if it went well, 2 if it refuses its input, else the status of the program that failed in it."""
    try:
        work()
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
