"""What scripts that time our loops against published ones share: options, rounds in turn, errors and the result."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from varaccel.errors import InputError, VaraccelError
from varaccel.files import check_writable, write_text
from varaccel.nn.devices import Device, wait_for

DTYPES = ("float32", "bfloat16", "float16")

T = TypeVar("T")


def loop_parser(description: str | None, *, repeats: int = 5, batch: int = 1) -> argparse.ArgumentParser:
    """Options that all of them have: --batch, --repeats, --device and --out."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON here")
    return parser


def in_turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What every run gave in each of `repeats` rounds; a round before them warms up.

    All run once per round, so that a machine that slows down meets all of them.
    """
    taken: dict[str, list[T]] = {name: [] for name in runs}
    for repeat in tqdm(range(repeats + 1), desc="measuring", disable=None):
        for name, run in runs.items():
            given = run()
            if repeat:
                taken[name].append(given)
    return taken


def seconds_of(run: Callable[[], object], device: Device) -> float:
    """Seconds until what `run` gave the device to do is done."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long theirs takes: the ratio of the medians."""
    return statistics.median(theirs) / statistics.median(ours)


def run_script(measure: Callable[[], dict[str, Any] | None], options: argparse.Namespace) -> int:
    """Measure, print the figures as JSON, write them where --out says, and give the exit code of the script.

    Args:
        measure: gives the figures; None if it has shown them itself, so that they are not printed.
    """
    try:
        if options.batch < 1 or options.repeats < 1:
            raise InputError("--batch and --repeats must be at least 1.")
        check_writable(options.out)
        result = measure()
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None:
        print(json.dumps(result, indent=2))
        write_result(result, options)
    return 0


def write_result(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the figures where --out says, if it says."""
    if options.out:
        write_text(json.dumps(result, indent=2) + "\n", options.out)
