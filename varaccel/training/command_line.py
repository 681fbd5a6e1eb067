"""What command lines of trainers share: when training ends, and bad input as one sentence without a traceback."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from varaccel.errors import VaraccelError
from varaccel.training.run import Budget


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


def add_until(parser: argparse.ArgumentParser) -> None:
    """The option `--until`, see `training_budget`."""
    parser.add_argument(
        "--until",
        type=float,
        metavar="SECONDS",
        help="train until this time instead, in seconds since the epoch (`date +%%s`)",
    )


def training_budget(options: argparse.Namespace) -> Budget:
    """What `--steps`, where there is one, and `--minutes` or `--until` say."""
    steps = getattr(options, "steps", None)
    return Budget(steps, None if options.until else options.minutes, options.until)
